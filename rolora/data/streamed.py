"""Rows that are read from where they lie whenever they are asked for: a million of them are no
million objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

IN_MEMORY = 20_000  # rows or examples: more are read from disk as they are asked for


class Row(dict):
    """A row that knows its number in the file, wherever it is split off to."""

    number: int


def numbered_row(row: dict, number: int) -> Row:
    """The row with its number, from 1."""
    own = Row(row)
    own.number = number
    return own


class Streamed(Sequence[Row]):
    """`count` rows of `stream()`, which begins anew at every call, or those of them at `places`
    (int64, ascending). Read from the first on: a single row costs all before it.
    """

    def __init__(
        self,
        stream: Callable[[], Iterator[dict]],
        count: int,
        places: np.ndarray | None = None,
    ):
        self._stream, self._count, self._places = stream, count, places

    def __len__(self) -> int:
        return self._count if self._places is None else len(self._places)

    def __iter__(self) -> Iterator[Row]:
        rows = (numbered_row(row, number) for number, row in enumerate(self._stream(), 1))
        if self._places is None:
            yield from rows
            return
        read = 0
        for place in self._places:
            yield next(islice(rows, int(place) - read, None))
            read = int(place) + 1

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if not isinstance(index, slice):
            return next(islice(self, range(len(self))[index], None))
        start, stop, step = index.indices(len(self))
        if step < 0:
            raise ValueError("rows are read from the first on: a slice goes forward")
        return list(islice(self, start, stop, step))

    def at(self, places: np.ndarray) -> Streamed:
        """The rows at those places of these, int64 and ascending."""
        whole = places if self._places is None else self._places[places]
        return Streamed(self._stream, self._count, whole)


def chosen(rows: Sequence[dict], places: np.ndarray) -> Sequence[dict]:
    """The rows at `places`, ascending."""
    if isinstance(rows, Streamed):
        return rows.at(places)
    return [rows[i] for i in places]
