"""FedEx-LoRA: both factors are averaged; what the product of the means lacks is added to the base,
so that the mean is exact.

Singhal et al., ACL 2025. The residual is `mean(B_i A_i) − B̄ Ā = Σ_i w_i (B_i − B̄)(A_i − Ā)`, of
rank (clients − 1) r at most; it is cut to its numerical rank, appended to the term of the state,
and travels down beside the means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rolora.federated.aggregate import Collector
from rolora.federated.layout import TERM
from rolora.federated.methods.flexlora import Products, truncate

if TYPE_CHECKING:
    from rolora.federated.methods import Context

KEEPS_COORDINATES = True
CHANGES_BASE = True


def phase(round: int, schedule: str) -> str:
    return "BOTH"


class Residual(Products):
    def finish(self) -> dict[str, Tensor]:
        if not self.clients:
            return {}  # a round that nobody came to, where --quorum 0 bears that
        change, layout, state = self.mean.finish(), self.context.layout, self.context.state
        means = {kind: state.master[kind] + change[kind] for kind in ("A", "B")}
        A_of, B_of = layout.views(means, "A"), layout.views(means, "B")
        stacks, rank = self.stacks(state.published), 0
        parts = {}
        for path, (left, right) in stacks.items():
            left, right = (
                torch.cat([left, -B_of[path].double()], 1),
                torch.cat([right, A_of[path].double()]),
            )
            most = min(*left.shape, right.shape[1])
            U, V = truncate(left, right, most)
            parts[path] = U, V
            energy = V.square().sum(1)  # the singular values
            rank = max(rank, int((energy > 1e-7 * energy[0]).sum()))
        if rank == 0:
            return change
        return change | {
            TERM: layout.term(
                {path: (_first(U, rank, 1), _first(V, rank, 0)) for path, (U, V) in parts.items()}
            )
        }


def _first(values: Tensor, rank: int, dim: int) -> Tensor:
    """The first `rank` columns or rows, filled up with zeros where an adapter has fewer."""
    missing = rank - values.shape[dim]
    if missing <= 0:
        return values.narrow(dim, 0, rank)
    shape = [missing if i == dim else size for i, size in enumerate(values.shape)]
    return torch.cat([values, values.new_zeros(shape)], dim)


def collect(context: Context, collector: Collector) -> Residual:
    return Residual(context, collector)
