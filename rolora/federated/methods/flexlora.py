"""FlexLoRA: the server averages the products B_i A_i and truncates the mean by SVD to the rank. Bai et al., NeurIPS 2024.

The mean product is never formed: with stacks L = [w_1 B_1 | … | w_n B_n] and R = [A_1; …; A_n], the SVD of L R follows
from QR of L and Rᵀ. Needs every client's own factors, so it is not compatible with secure aggregation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora.federated.aggregate import Collector
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState


def phase(round: int, schedule: str) -> str:
    return "BOTH"


class ProductCollector:
    """Keeps the clients' factors, ordered by client so that arrival does not matter, and re-factors their mean product.

    The head, where one travels, is averaged exactly as everywhere.
    """

    def __init__(self, state: GlobalState, layout: Layout, phase: str, mean: Collector):
        self.state, self.layout, self.phase, self.mean = state, layout, phase, mean
        self.clients: dict[int, tuple[int, dict[str, Tensor]]] = {}

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.mean.add(client, change, weight)
        parts = self.layout.part(change, self.phase)
        self.clients[client] = weight, {kind: self.state.published[kind] + parts[kind] for kind in ("A", "B")}

    def finish(self) -> dict[str, Tensor]:
        change = self.mean.finish()  # the head's mean stands; A and B are replaced
        weights = [(weight, factors) for _, (weight, factors) in sorted(self.clients.items())]
        total = sum(weight for weight, _ in weights)
        A_of, B_of = ([self.layout.views(factors, kind) for _, factors in weights] for kind in ("A", "B"))
        new = {kind: torch.empty_like(self.state.master[kind]) for kind in ("A", "B")}
        new_A, new_B = self.layout.views(new, "A"), self.layout.views(new, "B")
        for path in new_A:
            left = torch.cat([B[path].double() * (w / total) for (w, _), B in zip(weights, B_of, strict=True)], dim=1)
            right = torch.cat([A[path].double() for A in A_of])
            B, A = truncate(left, right, rank=new_A[path].shape[0])
            new_B[path].copy_(B), new_A[path].copy_(A)
        return change | {kind: new[kind] - self.state.master[kind] for kind in ("A", "B")}


def collect(state: GlobalState, layout: Layout, phase: str, collector: Collector) -> ProductCollector:
    return ProductCollector(state, layout, phase, collector)


def truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors (B = U√Σ `[N, rank]`, A = √Σ Vᵀ `[rank, K]`) of `left @ right`, fp64.

    Signs are fixed (the largest element of each column of U is positive), so that equal products give equal factors.
    """
    Q_l, R_l = torch.linalg.qr(left)
    Q_r, R_r = torch.linalg.qr(right.t())
    U, values, Vt = torch.linalg.svd(R_l @ R_r.t(), full_matrices=False)
    U, Vt = Q_l @ U[:, :rank], Vt[:rank] @ Q_r.t()
    signs = torch.gather(U, 0, U.abs().argmax(0, keepdim=True)).sign()
    signs[signs == 0] = 1.0
    root = values[:rank].sqrt()
    return U * signs * root, (Vt * signs.t()) * root.unsqueeze(1)
