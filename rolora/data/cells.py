"""What a value of a row may be: a text, a label, a list of choices. Nothing is made into text by
chance.

Every function raises ValueError with what was found and what was expected; who reads a file adds
which row it was.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable

_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")


def text(value: object) -> str:
    """A text as it is; a list, a number, bytes or nothing are none."""
    if not isinstance(value, str):
        raise ValueError(f"{named(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text with a lone surrogate at {error.start}, expected text") from None
    return value


def label(value: object) -> str:
    """A class's name: 1, 1.0, "1" and "1.0" are one class."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{named(value)}, expected a label: text or a whole number")
    name = text(value).strip()
    if not name:
        raise ValueError("an empty text, expected a label")
    if _WHOLE.fullmatch(name):
        return str(int(name.partition(".")[0]))
    return value


def is_whole(name: str) -> bool:
    """Whether a label is a whole number in ASCII digits."""
    return _WHOLE.fullmatch(name) is not None


def choices(value: object) -> list[str]:
    """A list of texts or numbers, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{named(value)}, expected a list or JSON text of one") from None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{named(value)}, expected a list of choices")
    return [str(choice) if type(choice) in (int, float) else text(choice) for choice in value]


def answer(value: object, among: list[str]) -> int:
    """The index of the right choice: a whole number is an index, a text is a choice's own, else an
    index or a letter.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{named(value)}, expected the index or the text of a choice")
    if isinstance(value, int):
        return value
    if value in among:
        return among.index(value)
    name = value.strip()
    if _WHOLE.fullmatch(name):
        return int(name.partition(".")[0])
    if len(name) == 1 and name.upper() in string.ascii_uppercase:
        return string.ascii_uppercase.index(name.upper())
    raise ValueError(f"{named(value)}, which is none of the {len(among)} choices")


def template(text: str) -> Callable[[dict], str]:
    """A function that fills `{column}` in; `\\n`, `\\t` and `\\\\` are written as in Python.

    Only names of columns may stand in braces: no attributes, indices or formats.
    """
    try:
        parts = list(string.Formatter().parse(_unescaped(text)))
    except ValueError as error:
        raise ValueError(f"prompt template {text!r}: {error}") from None
    for _, field, form, conversion in parts:
        if field is not None and (form or conversion or not field or set(field) & set(".[]")):
            shown = "{" + field + (f"!{conversion}" if conversion else "")
            shown += (f":{form}" if form else "") + "}"
            raise ValueError(
                f"prompt template {text!r}: {shown} is no name of a column: only {{column}} is "
                "filled in"
            )

    def fill(row: dict) -> str:
        filled = []
        for literal, field, _, _ in parts:
            filled.append(literal)
            if field is not None:
                filled.append(_filled(text, row, field))
        return "".join(filled)

    return fill


def _filled(template: str, row: dict, column: str) -> str:
    if column not in row:
        raise ValueError(
            f"prompt template {template!r} does not fit the columns {', '.join(map(str, row))}: "
            f"there is no {column!r}"
        )
    value = row[column]
    if type(value) in (int, float):
        return str(value)
    try:
        return text(value)
    except ValueError as error:
        raise ValueError(f"column {column!r} is {error}") from None


def _unescaped(text: str) -> str:
    known = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda found: known[found.group()], text)


def named(value: object) -> str:
    """A value in an error: its type, and its beginning."""
    if value is None:
        return "nothing (null)"
    kind = {"str": "text", "NoneType": "nothing"}.get(type(value).__name__, type(value).__name__)
    return f"{kind} {repr(value)[:40]}"
