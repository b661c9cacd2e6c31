"""Rows from files (JSONL, JSON, CSV, TSV, Parquet) or from a Hugging Face data set."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rolora.errors import BadInput
from rolora.hf import models

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_file(path: str | Path) -> list[dict]:
    """The rows of a file; raises BadInput naming the file, and the line where one is broken."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist: give a {', '.join(SUFFIXES)} file")
    if path.suffix not in SUFFIXES or path.is_dir():
        raise BadInput(f"{path} is not a data file: expected {', '.join(SUFFIXES)}")
    try:
        rows = _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not rows:
        raise BadInput(f"{path} holds no rows")
    return rows


def find(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The files of the first of `stems` that a folder has: `train.jsonl`, or the hub's shards
    `train-00000-of-00002.parquet`.
    """
    for stem in stems:
        for suffix in SUFFIXES:
            shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
            if shards:
                return shards
    raise BadInput(f"{folder} has no {' or '.join(stems)} file ({', '.join(SUFFIXES)})")


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
        models.use_cache_if_unreachable()
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


class Selection(list):
    """Some of a file's rows; `numbers` are theirs in the file, from 1."""

    def __init__(self, rows: Sequence[dict], numbers: Sequence[int]):
        super().__init__(rows)
        self.numbers = list(numbers)


def numbered(rows: Sequence[dict]) -> list[tuple[int, dict]]:
    """(number in the file, row), for errors that name a row; other lists are counted from 1."""
    numbers = getattr(rows, "numbers", range(1, len(rows) + 1))
    return list(zip(numbers, rows, strict=True))


def select(rows: Sequence[dict], indices: Iterable[int]) -> Selection:
    """The rows at `indices`, with their numbers."""
    numbers = getattr(rows, "numbers", range(1, len(rows) + 1))
    chosen = list(indices)
    return Selection([rows[i] for i in chosen], [numbers[i] for i in chosen])


@dataclass(frozen=True)
class Column:
    """A column that every row must have; `check` raises ValueError for a value that is none."""

    name: str | None
    check: Callable[[object], object]


def require_columns(rows: Sequence[dict], columns: dict[str, Column], where: str) -> None:
    """Raises BadInput for the first row whose value of a column (by flag) is missing or of another
    kind, with the nearest column where there is none.
    """
    for flag, column in columns.items():
        if column.name is not None:
            for number, row in enumerate(rows, 1):
                _require(row, number, flag, column, where)


def _require(row: dict, number: int, flag: str, column: Column, where: str) -> None:
    name = column.name
    if name not in row and number == 1:
        close = difflib.get_close_matches(name, list(map(str, row)), n=1, cutoff=0.5)
        hint = f"; did you mean {flag} {close[0]}?" if close else f": name one with {flag}"
        raise BadInput(f"{where} has no column {name!r}, it has {', '.join(map(str, row))}{hint}")
    if row.get(name) is None:
        raise BadInput(f"{where}: row {number} has no value for column {name!r}")
    try:
        column.check(row[name])
    except ValueError as error:
        raise BadInput(f"{where}: row {number}: column {name!r} is {error}") from None


def _json_lines(path: Path) -> list[dict]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_row(line, f"{path}, line {number}"))
    return rows


def _json(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path}: expected a list of objects")
    return rows


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected an object, got {type(row).__name__}")
    return row


def _csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            rows = list(reader)
        except csv.Error as error:
            raise BadInput(f"{path}, line {reader.line_num}: {error}") from None
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise BadInput(f"{path}, row {number}: its number of fields differs from the heading's")
    return rows


def _parquet(path: Path) -> list[dict]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise BadInput(
            f"{path} needs the package `pyarrow`: pip install '.[data]' in your clone"
        ) from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise BadInput(f"{path} is not a Parquet file: {error}") from None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
