"""How the changes of a round become one: the exact weighted mean, or a rule that a few wrong
clients cannot move far.

A collector takes accepted changes one by one, in any order, and gives the same bits for every
order.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from rolora.federated.guard import Bounds
from rolora.federated.layout import Layout
from rolora_kernels.exact_sum import ExactSum

RULES = ("mean", "median", "trimmed-mean")
_COLUMNS = 1 << 16  # values of every client that a robust rule sorts at a time


class Collector(Protocol):
    """Takes changes fp32 `[n]` of the travelling kinds, joined, and gives the aggregate by kind."""

    def add(self, client: int, change: Tensor, weight: int) -> None: ...

    def finish(self) -> dict[str, Tensor]: ...


def collector(rule: str, trim: float, layout: Layout, phase: str, bounds: Bounds) -> Collector:
    """The collector of a rule; `trim` is the part that trimmed-mean drops at either end."""
    if rule == "mean":
        return Mean(layout, phase, bounds)
    return Robust(0.5 if rule == "median" else trim, layout, phase)


def least_clients(rule: str, trim: float) -> int:
    """How many changes a rule needs to bear a wrong one: fewer would be a plain mean."""
    if rule == "mean":
        return 1
    return 3 if rule == "median" else math.ceil(1 / trim)


class Mean:
    """Σ w·Δ / Σ w, in constant memory. `slack`: what noise may add to the sum, in its steps."""

    slack = 0.0

    def __init__(self, layout: Layout, phase: str, bounds: Bounds):
        self.layout, self.phase = layout, phase
        self.sum = ExactSum(
            layout.travelling_size(phase), bounds.max_abs, bounds.max_weight, bounds.max_terms
        )

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.sum.add(change, weight)

    def finish(self) -> dict[str, Tensor]:
        return self.layout.part(self.sum.mean(), self.phase)


class Robust:
    """Coordinate by coordinate: the mean of what is left when `trim` of the clients are dropped at
    either end; .5 is the median (Yin et al., ICML 2018). Unweighted, because a weight is a claim.
    Keeps every change: n values a client.

    Valid for one travelling factor, or two averaged separately, not for FlexLoRA, whose aggregate
    is of products.
    """

    def __init__(self, trim: float, layout: Layout, phase: str):
        self.trim, self.layout, self.phase = trim, layout, phase
        self.changes: list[Tensor] = []

    def add(self, client: int, change: Tensor, weight: int) -> None:
        self.changes.append(change)

    def finish(self) -> dict[str, Tensor]:
        count = len(self.changes)
        dropped = min(int(self.trim * count), (count - 1) // 2)
        columns = zip(*(change.split(_COLUMNS) for change in self.changes), strict=True)
        parts = [
            torch.stack(part).sort(0).values[dropped : count - dropped].double().mean(0).float()
            for part in columns
        ]
        return self.layout.part(torch.cat(parts), self.phase)
