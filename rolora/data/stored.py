"""Many examples on disk: an Arrow file, mapped into memory through `datasets`, whose examples are
made anew when they are asked for. What an example may hold is told by its dataclass.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")
_AT_ONCE = 1000  # examples that are made at a time where all of them are gone through


class Unstorable(Exception):
    """Why examples stay in memory, in words."""


class Stored(Sequence[T], Generic[T]):
    """A sequence of equal examples to those that were written; one is made at every access."""

    def __init__(self, path: Path, cls: type[T]):
        import datasets

        self._table = datasets.Dataset.from_file(str(path)).data
        self._make = _maker(cls)

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._made(start, _AT_ONCE)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            places = range(len(self))[index]
            if places.step == 1:
                return self._made(places.start, len(places))
            return [self[place] for place in places]
        place = range(len(self))[int(index)]
        return self._made(place, 1)[0]

    def column(self, name: str) -> np.ndarray:
        """One field of all examples, without making them."""
        return self._table.column(name).to_numpy()

    def _made(self, start: int, count: int) -> list[T]:
        if count == 0:
            return []
        return [self._make(row) for row in self._table.fast_slice(start, count).to_pylist()]


def column(examples: Sequence[Any], name: str) -> list[Any] | np.ndarray:
    """A field of all examples."""
    if isinstance(examples, Stored):
        return examples.column(name)
    return [getattr(example, name) for example in examples]


def store(parts: Iterable[list[T]]) -> Sequence[T]:
    """All examples of `parts`, none of them empty, on disk, in a file without a name, which is gone
    with the process.

    Raises Unstorable, before the second part is asked for, where the package is missing or a
    dataclass says nothing that Arrow can hold; OverflowError for whole numbers in a list that are
    over 32 bits.
    """
    try:
        import datasets  # noqa: F401
        import pyarrow
    except ImportError:
        raise Unstorable("pip install '.[data]' in your clone reads them from disk") from None
    rest = iter(parts)
    first = next(rest, None)
    if first is None:
        return []
    cls = type(first[0])
    schema = pyarrow.schema(_fields(cls))
    handle, name = tempfile.mkstemp(prefix="rolora-", suffix=".arrow")
    try:
        with open(handle, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for part in chain([first], rest):
                if set(map(type, part)) - {cls}:
                    raise TypeError(f"not every example is a {cls.__name__}")
                for start in range(0, len(part), _AT_ONCE):
                    rows = [_plain(example) for example in part[start : start + _AT_ONCE]]
                    try:
                        table = pyarrow.Table.from_pylist(rows, schema)
                    except pyarrow.ArrowInvalid as error:
                        raise OverflowError(f"no {cls.__name__}: {error}") from None
                    writer.write_table(table)
        return Stored(Path(name), cls)
    finally:
        os.unlink(name)  # what is mapped stays


def _fields(cls: type) -> list[tuple[str, Any]]:
    """Name and Arrow type of every field; raises Unstorable."""
    if not dataclasses.is_dataclass(cls):
        raise Unstorable(f"{cls.__name__} is no dataclass")
    hints = _hints(cls)
    return [(own.name, _arrow(hints[own.name])) for own in dataclasses.fields(cls)]


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception as error:  # a name that only its own module knows
        raise Unstorable(f"what {cls.__name__} holds is not told: {error}") from None


def _arrow(hint: Any) -> Any:
    import pyarrow

    plain = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.large_string()}
    plain[bool] = pyarrow.bool_()
    own, inner = _without_none(hint), typing.get_args(_without_none(hint))
    if own in plain:
        return plain[own]
    if typing.get_origin(own) in (list, tuple):
        kinds = {kind for kind in inner if kind is not Ellipsis}
        if len(kinds) == 1:
            (kind,) = kinds
            return pyarrow.list_(pyarrow.int32() if kind is int else _arrow(kind))
    if isinstance(own, type) and dataclasses.is_dataclass(own):
        return pyarrow.struct(_fields(own))
    raise Unstorable(f"Arrow does not hold {hint}")


def _without_none(hint: Any) -> Any:
    """X of `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        left = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(left) == 1:
            return left[0]
    return hint


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {own.name: _plain(getattr(value, own.name)) for own in dataclasses.fields(value)}
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int):
        return [_plain(item) for item in value]
    return value


def _maker(hint: Any) -> Callable[[Any], Any]:
    """What makes a value of that type of what Arrow gives back."""
    own, inner = _without_none(hint), typing.get_args(_without_none(hint))
    kind = typing.get_origin(own)
    if isinstance(own, type) and dataclasses.is_dataclass(own):
        hints = _hints(own)
        return _or_none(partial(_made, own, {name: _maker(hints[name]) for name in _names(own)}))
    if kind is tuple:
        return _or_none(partial(_each, tuple, _maker(inner[0])))
    if kind is list and inner[0] not in (int, float, str, bool):
        return _or_none(partial(_each, list, _maker(inner[0])))
    return _same


def _same(value: Any) -> Any:
    return value


def _or_none(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else make(value)


def _made(cls: type, makers: dict[str, Callable[[Any], Any]], value: dict[str, Any]) -> Any:
    return cls(**{name: make(value[name]) for name, make in makers.items()})


def _each(kind: type, make: Callable[[Any], Any], values: list[Any]) -> Any:
    return kind(map(make, values))


def _names(cls: Any) -> list[str]:
    return [own.name for own in dataclasses.fields(cls)]
