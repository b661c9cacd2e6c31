"""Rows of one file in its format: JSON, JSON lines, CSV, TSV, Parquet, and gzip around any but
Parquet.

What a file is called says which; how JSON is laid out and what separates columns is looked at.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rolora.errors import BadInput
from rolora.hf.pointers import is_pointer

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST = 2**31 - 1  # characters of a field
_AT_ONCE = 1000  # rows of a Parquet file


def suffix_of(path: Path) -> str | None:
    """The format's suffix, in small letters and without `.gz`; None for another kind of file."""
    name = path.name.lower().removesuffix(".gz")
    found = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if found == ".parquet" and path.name.lower().endswith(".gz") else found


def is_one_by_one(path: Path) -> bool:
    """Whether rows can be read one after another: not those of a JSON array, which is parsed as a
    whole.
    """
    if suffix_of(path) not in (".json", ".jsonl"):
        return True
    with _open(path) as file:
        return not next((line for line in file if line.strip()), "").lstrip().startswith("[")


def stream(path: Path) -> Iterator[dict]:
    """The rows, one after another; raises BadInput naming the file, and the line where one is
    broken.
    """
    suffix = suffix_of(path)
    try:
        if is_pointer(path):
            raise BadInput(f"{path} is Git LFS's pointer to a file, not the file: run git lfs pull")
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as text:
            if suffix in (".json", ".jsonl"):
                yield from _json(text, path)
            else:
                yield from _separated(text, path, "\t" if suffix == ".tsv" else None)
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path} is no whole gzip file: {error}") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _json(file: IO[str], path: Path) -> Iterator[dict]:
    """An array of objects, or an object a line."""
    for number, line in enumerate(file, 1):
        if line.lstrip().startswith("["):
            found = _parsed(line + file.read(), f"{path}")
            if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
                raise BadInput(f"{path}: expected a list of objects, or an object a line")
            yield from found
        elif line.strip():
            row = _parsed(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected an object")
            yield row


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{where} is not valid JSON: {error}; expected a list of objects, or an object a line"
        ) from None


def _separated(file: IO[str], path: Path, separator: str | None) -> Iterator[dict]:
    csv.field_size_limit(_LONGEST)
    heading = file.readline()
    if separator is None:
        # The one that makes the most columns; a comma where all make one.
        separator = max(",;\t", key=lambda s: len(next(csv.reader([heading], delimiter=s), [])))
    file.seek(0)
    reader = csv.reader(file, delimiter=separator)
    try:
        names = next(reader, [])
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            raise BadInput(f"{path} has two columns {twice[0]!r}: rename one")
        for fields in reader:
            if fields and len(fields) != len(names):
                raise BadInput(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, and the heading "
                    f"has {len(names)}"
                )
            if fields:
                yield dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[dict]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise BadInput(
            f"{path} needs the package `pyarrow`: pip install '.[data]' in your clone"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_AT_ONCE):
                yield from batch.to_pylist()
    except Exception as error:  # a damaged page is one of a dozen kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path} is not a Parquet file, or damaged: {first[:200]}") from None
