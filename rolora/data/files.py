"""Rows from files (JSONL, JSON, CSV, TSV, Parquet) or from a Hugging Face data set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from rolora.data import formats
from rolora.data.formats import SUFFIXES
from rolora.errors import BadInput
from rolora.hf import reading


def read_file(path: str | Path) -> list[dict]:
    """The rows of a file; raises BadInput naming the file, and the line where one is broken."""
    path = Path(path)
    if not os.path.exists(path):
        raise BadInput(f"{path} does not exist: give a {', '.join(SUFFIXES)} file")
    if formats.suffix_of(path) is None or path.is_dir():
        raise BadInput(f"{path} is not a data file: expected {', '.join(SUFFIXES)}")
    rows = formats.read(path)
    if not rows:
        raise BadInput(f"{path} holds no rows")
    return rows


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


class Row(dict):
    """A row that knows its number in the file, wherever it is split off to."""

    number: int


def with_numbers(rows: Sequence[dict]) -> list[dict]:
    """The rows with their numbers, from 1."""
    found: list[dict] = []
    for number, row in enumerate(rows, 1):
        own = Row(row)
        own.number = number
        found.append(own)
    return found


def number_of(row: dict, place: int) -> int:
    """The row's number in its file; for one that has none, from its place among others."""
    return getattr(row, "number", place + 1)


def numbered(rows: Sequence[dict]) -> list[tuple[int, dict]]:
    """(number in the file, row), for errors that name a row."""
    return [(number_of(row, place), row) for place, row in enumerate(rows)]


def read_hub(name: str, config: str | None, splits: Sequence[str]) -> list[dict] | None:
    """The first of `splits` that a data set on the hub has, None where it has none; `name@revision`
    names a branch. Class labels come as their names.
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
    return None if found is None else with_label_names(data[found])


def with_label_names(part) -> list[dict]:
    """The rows of a `datasets.Dataset`, class labels by name; an unlabelled example (-1) has
    None.
    """
    rows = part.to_list()
    for column, feature in part.features.items():
        names = getattr(feature, "names", None)
        if names:
            for row in rows:
                row[column] = (
                    names[row[column]] if row[column] is not None and row[column] >= 0 else None
                )
    return rows


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
    kind, with the nearest column where there is none.
    """
    found = columns_of(rows)
    for flag, column in columns.items():
        if column.name is None:
            continue
        if column.name not in found:
            names = [str(name) for name in found if not str(name).startswith("\0")]
            close = difflib.get_close_matches(column.name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {flag} {close[0]}?" if close else f": name one with {flag}"
            raise BadInput(
                f"{where} has no column {column.name!r}, it has {', '.join(names)}{hint}"
            )
        for number, row in numbered(rows):
            _require(row, number, column.name, column.check, where)


def _require(row: dict, number: int, name: str, check: Callable, where: str) -> None:
    if row.get(name) is None:
        raise BadInput(f"{where}: row {number} has no value for column {name!r}")
    try:
        check(row[name])
    except ValueError as error:
        raise BadInput(f"{where}: row {number}: column {name!r} is {error}") from None
