"""Sums that do not depend on order.

A sum of client changes is kept in int64 fixed point: `acc += rint(w · Δ / q)` with q a power of two
chosen from declared bounds, so that no overflow is possible. Integer addition is associative: any
order, chunking or number of ranks gives the same bits, and that is also the form secure aggregation
needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SUM_CHUNK = 1 << 18  # values computed at a time, so that their fp64 and int64 stay in cache
_BITS = 62


class ExactSum:
    """Σ w·Δ over at most `max_terms` terms of `size` values with `|Δ| ≤ max_abs` and `1 ≤ w ≤
    max_weight`, w integer.

    The resolution `q` is the finest power of two for which the sum cannot overflow 62 bits. A term
    beyond the bounds, or one that is not finite, raises ValueError and leaves the sum as it was.
    """

    def __init__(self, size: int, max_abs: float, max_weight: int, max_terms: int):
        bound = max_abs * max_weight * max_terms
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(
                f"bounds must be positive and finite, got {max_abs}, {max_weight}, {max_terms}"
            )
        self.max_abs, self.max_weight, self.max_terms = max_abs, max_weight, max_terms
        self.exponent = math.frexp(bound)[1] - _BITS  # q = 2**exponent
        self.total = torch.zeros(size, dtype=torch.int64)
        self.weight = 0
        self.terms = 0

    def add(self, values: Tensor, weight: int) -> None:
        """Adds `weight · values`; values fp32 `[size]` on the CPU."""
        if values.shape != self.total.shape:
            raise ValueError(f"expected {list(self.total.shape)} values, got {list(values.shape)}")
        if weight != int(weight) or not 1 <= weight <= self.max_weight:
            raise ValueError(f"weight must be an integer from 1 to {self.max_weight}, got {weight}")
        if self.terms == self.max_terms:
            raise ValueError(f"more than the declared {self.max_terms} terms")
        largest = values.abs().max().item() if values.numel() else 0.0
        if not largest <= self.max_abs:  # also true for NaN
            raise ValueError(f"a change of {largest:g} is over the bound of {self.max_abs:g}")
        factor = math.ldexp(float(weight), -self.exponent)
        for total, part in zip(self.total.split(_SUM_CHUNK), values.split(_SUM_CHUNK), strict=True):
            total.add_(part.double().mul_(factor).round_().to(torch.int64))
        self.weight += int(weight)
        self.terms += 1

    def partial(self) -> Tensor:
        """Everything that this sum holds, int64 `[size + 2]`: its total, its weight, its terms.

        Partial sums of one declaration may be added element by element, by an all-reduce for
        example, and taken over by `replace`.
        """
        return torch.cat([self.total, torch.tensor([self.weight, self.terms])])

    def replace(self, partial: Tensor) -> None:
        """Holds what a sum of partial sums says; raises ValueError for more terms than declared."""
        weight, terms = partial[-2:].tolist()
        if partial.shape != (len(self.total) + 2,) or terms > self.max_terms:
            raise ValueError(f"{terms} terms are over the declared {self.max_terms}")
        self.total, self.weight, self.terms = partial[:-2].clone(), weight, terms

    def mean(self) -> Tensor:
        """Σ w·Δ / Σ w as fp32 `[size]`, one rounding from fp64."""
        if self.weight == 0:
            raise ValueError("no term was added: there is no mean")
        return self.over(self.weight)

    def over(self, divisor: float) -> Tensor:
        """Σ w·Δ / divisor as fp32 `[size]`."""
        return self.total.double().mul_(math.ldexp(1.0, self.exponent) / divisor).float()
