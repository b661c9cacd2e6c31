"""FlexLoRA: the server averages the products B_i A_i and truncates the mean by SVD to the rank.

Bai et al., NeurIPS 2024.

The mean product is never formed: with stacks L = [w_1 B_1 | … | w_n B_n] and R = [A_1; …; A_n], the
SVD of L R follows from QR of L and Rᵀ. Needs every client's own factors, so it is not compatible
with secure aggregation. A client may train fewer ranks than the others: the first ones, which are
the largest after the first round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rolora.federated.aggregate import Collector

if TYPE_CHECKING:
    from rolora.federated.methods import Context

TAKES_CLIENT_RANKS = True


def phase(round: int, schedule: str) -> str:
    return "BOTH"


class Products:
    """Keeps the clients' factors, ordered by client so that arrival does not matter.

    The head, where one travels, is averaged exactly as everywhere.
    """

    def __init__(self, context: Context, mean: Collector):
        self.context, self.mean = context, mean
        self.clients: dict[int, tuple[int, Tensor]] = {}

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.mean.add(client, change, weight)
        self.clients[client] = weight, change

    def stacks(self, start: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """path → (L `[out, Σ r_i]`, R `[Σ r_i, in]`) in fp64 with `Σ w_i B_i A_i / Σ w_i = L R`,
        for the factors that clients ended with when all started from `start`.
        """
        layout, total = self.context.layout, sum(weight for weight, _ in self.clients.values())
        lefts: dict[str, list[Tensor]] = {}
        rights: dict[str, list[Tensor]] = {}
        for client, (weight, change) in sorted(self.clients.items()):
            parts = layout.part(change, "BOTH")
            own = {kind: start[kind] + parts[kind] for kind in ("A", "B")}
            rank = self.context.rank_of(client)
            for path, B in layout.views(own, "B").items():
                lefts.setdefault(path, []).append(B[:, :rank].double() * (weight / total))
            for path, A in layout.views(own, "A").items():
                rights.setdefault(path, []).append(A[:rank].double())
        return {path: (torch.cat(lefts[path], 1), torch.cat(rights[path])) for path in lefts}


class Truncated(Products):
    """The mean product at the adapter's rank."""

    def finish(self) -> dict[str, Tensor]:
        if not self.clients:
            return {}  # a round that nobody came to, where --quorum 0 bears that
        change, layout, state = self.mean.finish(), self.context.layout, self.context.state
        new = {kind: torch.empty_like(state.master[kind]) for kind in ("A", "B")}
        new_A, new_B = layout.views(new, "A"), layout.views(new, "B")
        for path, (left, right) in self.stacks(state.published).items():
            B, A = truncate(left, right, rank=new_A[path].shape[0])
            new_B[path].copy_(B), new_A[path].copy_(A)
        return change | {kind: new[kind] - state.master[kind] for kind in ("A", "B")}


def collect(context: Context, collector: Collector) -> Truncated:
    return Truncated(context, collector)


def truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors (B = U√Σ `[N, rank]`, A = √Σ Vᵀ `[rank, K]`) of `left @ right`,
    fp64.

    Signs are fixed (the largest element of each column of U is positive), so that equal products
    give equal factors.
    """
    Q_l, R_l = torch.linalg.qr(left)
    Q_r, R_r = torch.linalg.qr(right.t())
    U, values, Vt = torch.linalg.svd(R_l @ R_r.t(), full_matrices=False)
    U, Vt = Q_l @ U[:, :rank], Vt[:rank] @ Q_r.t()
    signs = torch.gather(U, 0, U.abs().argmax(0, keepdim=True)).sign()
    signs[signs == 0] = 1.0
    root = values[:rank].sqrt()
    return U * signs * root, (Vt * signs.t()) * root.unsqueeze(1)
