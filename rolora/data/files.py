"""Rows from files (JSONL, JSON, CSV, TSV, Parquet) or from a Hugging Face data set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from rolora.data import formats, streamed
from rolora.data.formats import SUFFIXES
from rolora.data.streamed import Streamed, numbered_row
from rolora.errors import BadInput
from rolora.hf import reading

_AT_ONCE = 1000  # rows of a hub data set


def read_file(path: str | Path) -> Sequence[dict]:
    """The rows of a file; raises BadInput naming the file, and the line where one is broken. Many
    are read through once, and again whenever they are asked for.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise BadInput(f"{path} does not exist: give a {', '.join(SUFFIXES)} file")
    if formats.suffix_of(path) is None or path.is_dir():
        raise BadInput(f"{path} is not a data file: expected {', '.join(SUFFIXES)}")
    stamp = _stamp(path)
    whole = formats.stream(path)
    rows = list(islice(whole, streamed.IN_MEMORY + 1))
    if not rows:
        raise BadInput(f"{path} holds no rows")
    if len(rows) <= streamed.IN_MEMORY or not formats.is_one_by_one(path):
        return [*rows, *whole]

    def again() -> Iterator[dict]:
        if _stamp(path) != stamp:
            raise BadInput(f"{path} was changed while it was read: start anew")
        return formats.stream(path)

    count = len(rows) + sum(1 for _ in whole)
    return Streamed(again, count)


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def find(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The files of the first of `stems` that a folder has: `train.jsonl`, or the hub's shards
    `train-00000-of-00002.parquet`.
    """
    files = sorted(path for path in folder.iterdir() if formats.suffix_of(path) is not None)
    for stem in stems:
        for suffix in SUFFIXES:
            own = [path for path in files if formats.suffix_of(path) == suffix]
            alone = [path for path in own if path.name.lower().partition(".")[0] == stem]
            shards = [path for path in own if fnmatch(path.name.lower(), f"{stem}-*-of-*")]
            if alone or shards:
                return alone[:1] or shards
    raise BadInput(f"{folder} has no {' or '.join(stems)} file ({', '.join(SUFFIXES)})")


def with_numbers(rows: Sequence[dict]) -> Sequence[dict]:
    """The rows with their numbers, from 1."""
    if isinstance(rows, Streamed):
        return rows  # which gives them
    return [numbered_row(row, number) for number, row in enumerate(rows, 1)]


def number_of(row: dict, place: int) -> int:
    """The row's number in its file; for one that has none, from its place among others."""
    return getattr(row, "number", place + 1)


def numbered(rows: Sequence[dict]) -> Iterator[tuple[int, dict]]:
    """(number in the file, row), for errors that name a row."""
    for place, row in enumerate(rows):
        yield number_of(row, place), row


def read_hub(name: str, config: str | None, splits: Sequence[str]) -> Sequence[dict] | None:
    """The first of `splits` that a data set on the hub has, None where it has none; `name@revision`
    names a branch. Class labels come as their names. Many rows are read from the library's file,
    which is mapped into memory, whenever they are asked for.
    """
    try:
        import datasets
    except ImportError:
        raise BadInput(
            f"data set {name!r} needs the package `datasets`: pip install '.[data]' in your clone, "
            "or give --train-file"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        reading.use_cache_if_unreachable()
        data = datasets.load_dataset(repository, config, revision=revision or None)
    # The library raises a dozen kinds for a missing name, configuration, network or access.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"data set {name!r}{f' ({config})' if config else ''} could not be fetched: "
            f"{first[:200]}; "
            "for local files give --train-file and --eval-file"
        ) from None
    found = next((split for split in splits if split in data), None)
    if found is None:
        return None
    part = data[found]
    if len(part) <= streamed.IN_MEMORY:
        return list(with_label_names(part))
    return Streamed(lambda: with_label_names(part), len(part))


def with_label_names(part) -> Iterator[dict]:
    """The rows of a `datasets.Dataset`, class labels by name; an unlabelled example (-1) has
    None.
    """
    names = {
        column: feature.names
        for column, feature in part.features.items()
        if getattr(feature, "names", None)
    }
    for table in part.with_format("arrow").iter(_AT_ONCE):
        for row in table.to_pylist():
            for column, own in names.items():
                label = row[column]
                row[column] = own[label] if label is not None and label >= 0 else None
            yield row


@dataclass(frozen=True)
class Column:
    """A column that every row must have; `check` raises ValueError for a value that is none."""

    name: str | None
    check: Callable[[object], object]


def columns_of(rows: Sequence[dict]) -> dict[str, None]:
    """Every column that some row has, in order."""
    return dict.fromkeys(name for row in rows for name in row)


def require_columns(rows: Sequence[dict], columns: dict[str, Column], where: str) -> None:
    """Raises BadInput for the first row whose value of a column (by flag) is missing or of another
    kind, with the nearest column where there is none. All columns in one pass over the rows.
    """
    found: dict[str, None] = {}
    wrong: dict[str, BadInput] = {}  # flag → the first
    wanted = {flag: column for flag, column in columns.items() if column.name is not None}
    for number, row in numbered(rows):
        for name in row:
            found.setdefault(name)
        for flag, column in wanted.items():
            error = None if flag in wrong else _misfit(row, number, column, where)
            if error is not None:
                wrong[flag] = error
    for flag, column in wanted.items():
        if column.name not in found:
            names = [str(name) for name in found if not str(name).startswith("\0")]
            close = difflib.get_close_matches(str(column.name), names, n=1, cutoff=0.5)
            hint = f"; did you mean {flag} {close[0]}?" if close else f": name one with {flag}"
            raise BadInput(
                f"{where} has no column {column.name!r}, it has {', '.join(names)}{hint}"
            )
        if flag in wrong:
            raise wrong[flag]


def _misfit(row: dict, number: int, column: Column, where: str) -> BadInput | None:
    """What is wrong with a row's value of a column; None where nothing is."""
    if row.get(column.name) is None:
        return BadInput(f"{where}: row {number} has no value for column {column.name!r}")
    try:
        column.check(row[column.name])
    except ValueError as error:
        return BadInput(f"{where}: row {number}: column {column.name!r} is {error}")
    return None
