"""Which rows of a step belong to which adapter, where many adapters share one base in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_NONE = torch.iinfo(torch.int64).max  # a row of no adapter: behind those of all adapters


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """How many rows each adapter has, and how to sort rows that are not sorted by adapter.

    Made once a step and given to every layer, by `by_counts` or by `by_index`: of an index on a GPU
    the counts are read, which waits for the device once; the layers read nothing.

    counts: rows (or sequences, see `by_index`) of each adapter. unadapted: those of none, the
    last ones. order: int64, which given row stands at each sorted place, and places: where each
    given row went; None where rows come sorted.
    """

    counts: tuple[int, ...]
    unadapted: int = 0
    order: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def by_counts(cls, counts: Sequence[int], unadapted: int = 0) -> AdapterRows:
        """Rows that come adapter by adapter, `counts[c]` of adapter c (0 for one that is absent),
        and `unadapted` ones of the base alone after them.
        """
        counts = tuple(int(count) for count in counts)
        if not counts or min(*counts, unadapted, 0) < 0:
            raise ValueError(
                f"counts of rows must be 0 or more for one adapter at least, got {list(counts)} "
                f"and {unadapted} unadapted"
            )
        return cls(counts, unadapted)

    @classmethod
    def by_index(cls, index: Tensor | Sequence[int], adapters: int) -> AdapterRows:
        """Rows in any order: `index` int `[rows]` says each one's adapter, 0 … adapters − 1, or −1
        for the base alone.

        A shorter index speaks of as many rows together: one of `[batch]` for `x [batch, length,
        in]` says an adapter a sequence. Sorting costs a copy of x and of y; rows that are sorted
        already cost none.
        """
        index = torch.as_tensor(index)
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"an adapter's index must be an integer, got {index.dtype}")
        whose = index.detach().reshape(-1).long()
        whose = torch.where(whose == -1, _NONE, whose)
        by_adapter, order = whose.sort(stable=True)
        edges = torch.arange(adapters + 2, device=whose.device)
        edges[-1] = _NONE
        starts = torch.searchsorted(by_adapter, edges)
        ordered = (whose.diff() >= 0).all().view(1)
        *firsts, is_sorted = torch.cat([starts, ordered]).tolist()  # all that is read
        if firsts[0] or firsts[-1] != firsts[-2]:
            raise ValueError(
                f"indices must lie in 0 … {adapters - 1}, or be -1 for the base alone, got "
                f"{int(index.min())} … {int(index.max())}"
            )
        counts = tuple(end - first for first, end in pairwise(firsts[:-1]))
        unadapted = len(whose) - firsts[-1]
        if is_sorted:
            return cls(counts, unadapted)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return cls(counts, unadapted, order, places)

    @property
    def units(self) -> int:
        """The rows, or sequences, that are spoken of."""
        return sum(self.counts) + self.unadapted

    def each(self, rows: int) -> int:
        """How many of `rows` rows every unit speaks of; ValueError where they do not share out."""
        if self.units == 0 and rows == 0:
            return 1
        if self.units == 0 or rows % self.units:
            raise ValueError(
                f"x has {rows} rows, and an adapter is named for {self.units}: name one for every "
                "row or for every sequence of equal length"
            )
        return rows // self.units

    def even(self) -> bool:
        """Whether every adapter has as many rows and no row is left over: the client axis."""
        return self.unadapted == 0 and len(set(self.counts)) == 1

    def segments(self, rows: int) -> tuple[tuple[int, slice], ...]:
        """(adapter, its rows) of `rows` sorted rows, for every adapter that has any."""
        each, start, found = self.each(rows), 0, []
        for adapter, count in enumerate(self.counts):
            end = start + count * each
            if count and each:
                found.append((adapter, slice(start, end)))
            start = end
        return tuple(found)

    def sort(self, given: Tensor) -> Tensor:
        """`[rows, …]` as given → sorted by adapter."""
        return self._moved(given, self.order)

    def restore(self, by_adapter: Tensor) -> Tensor:
        """`[rows, …]` sorted by adapter → in the order that was given."""
        return self._moved(by_adapter, self.places)

    def _moved(self, rows: Tensor, order: Tensor | None) -> Tensor:
        if order is None or len(rows) == 0:
            return rows
        units = rows.unflatten(0, (len(order), -1))
        return units.index_select(0, order.to(rows.device)).flatten(0, 1)
