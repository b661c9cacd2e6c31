"""Rows that lie expert by expert, and in a cohort client by client within each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Whose rows are whose: `counts` int64 `[E, C]`, the rows of each expert, client by client."""

    counts: Tensor

    @classmethod
    def of(cls, experts: Tensor, count: int, clients: int = 1) -> tuple[Tensor, Rows]:
        """(the order that brings rows expert by expert, and in it client by client; the rows).

        experts: int64 `[M]` in [0, count), each row's expert; the first M / clients rows are the
        first client's, and so on. Rows of one expert and client keep their order.
        """
        place = experts
        if clients > 1:
            client = torch.arange(len(experts), device=experts.device) // (len(experts) // clients)
            place = experts * clients + client
        order = torch.argsort(place, stable=True)
        counts = torch.bincount(place, minlength=count * clients)
        return order, cls(counts.view(count, clients))

    @property
    def experts(self) -> int:
        return self.counts.shape[0]

    @property
    def clients(self) -> int:
        return self.counts.shape[1]

    @cached_property
    def host(self) -> list[list[int]]:
        """The counts on the host: on a GPU the one synchronisation of a mixture."""
        return self.counts.tolist()

    def ends(self, by_client: bool) -> Tensor:
        """Where each expert's rows end, or each client's in them: int32, as `grouped_mm` asks."""
        counts = self.counts.flatten() if by_client else self.counts.sum(1)
        return counts.cumsum(0, dtype=torch.int32)

    def spans(self) -> Iterator[tuple[int, slice, list[tuple[int, slice]]]]:
        """(expert, its rows, [(client, its rows)]) of every expert that has rows."""
        start = 0
        for expert, counts in enumerate(self.host):
            first, parts = start, []
            for client, count in enumerate(counts):
                if count:
                    parts.append((client, slice(start, start + count)))
                start += count
            if parts:
                yield expert, slice(first, start), parts
