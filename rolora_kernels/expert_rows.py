"""Which rows belong to which expert, and in a cohort to which client's factors of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rolora_kernels.rows import AdapterRows


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Rows sorted by expert, and those of an expert client by client: `pairs` are the rows of
    `experts` · `clients` adapters, of which expert e and client c are number e · clients + c.
    """

    pairs: AdapterRows
    experts: int
    clients: int = 1

    @classmethod
    def of(cls, chosen: Tensor, experts: int, clients: int = 1) -> ExpertRows:
        """chosen: int64 `[M]` in 0 … experts − 1, each row's expert, in any order; the first
        M / clients rows are the first client's, and so on. Rows of a pair keep their order.
        """
        if clients > 1:
            client = torch.arange(len(chosen), device=chosen.device) // (len(chosen) // clients)
            chosen = chosen * clients + client
        return cls(AdapterRows.by_index(chosen, experts * clients), experts, clients)

    @cached_property
    def spans(self) -> tuple[tuple[int, slice], ...]:
        """(expert, its sorted rows) of every expert that has any."""
        counts = self.pairs.counts
        by_expert = [
            sum(counts[first : first + self.clients])
            for first in range(0, len(counts), self.clients)
        ]
        return AdapterRows(tuple(by_expert)).segments(sum(by_expert))

    @cached_property
    def parts(self) -> tuple[tuple[tuple[int, ...], slice], ...]:
        """(where a factor has their matrix, sorted rows): `(e,)`, or `(c, e)` with clients."""
        if self.clients == 1:
            return tuple(((expert,), rows) for expert, rows in self.spans)
        found = self.pairs.segments(self.pairs.units)
        return tuple(((pair % self.clients, pair // self.clients), rows) for pair, rows in found)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that a factor has before its own two where no client has it in common."""
        return (self.experts,) if self.clients == 1 else (self.clients, self.experts)
