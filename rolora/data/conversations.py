"""Conversations as rows have them: `messages`, ShareGPT's `conversations`, Alpaca's `instruction`,
`input`, `output`, and `prompt` with `completion`.

Every function raises ValueError with what was found and what was expected; who reads a file adds
which row it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rolora.data import cells

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
# The columns that tell a format, the first that fits; the names are the formats'.
FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: `role`, `content`, and what else a message has.

    The first `given` of them are a prompt: nothing in them is learned. `tools` are JSON schemas.
    """

    messages: list[dict]
    given: int = 0
    tools: list[dict] | None = None


@dataclass(frozen=True)
class Continuation:
    """A text and how it goes on: no template is applied."""

    prompt: str
    completion: str


def format_of(row: dict) -> str | None:
    """The format that a row's columns tell, None where they tell none."""
    for name, columns in FORMATS.items():
        if all(column in row for column in columns):
            return name
    return None


def read(row: dict, form: str) -> Conversation | Continuation:
    """The conversation of a row whose columns are those of format `form`."""
    for column in FORMATS[form]:
        if row.get(column) is None:
            raise ValueError(f"it has no value for column {column!r}")
    tools = tools_of(row.get("tools"))
    if form == "instruction":
        return Conversation(_instruction(row), 0, tools)
    if form != "prompt":
        return Conversation(messages(row[form], form), 0, tools)
    before, after = row["prompt"], row["completion"]
    if is_text(before) and is_text(after):
        return Continuation(cells.text(before), cells.text(after))
    given, said = opening(before), turns(after, "completion")
    return Conversation([*given, *said], len(given), tools)


def is_text(value: object) -> bool:
    """Whether a cell is a text and not the JSON text of a list of messages."""
    if not isinstance(value, str):
        return False
    try:
        found = json.loads(value) if value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return True
    first = found[0] if found else None
    return not (isinstance(first, dict) and {"role", "from"} & first.keys())


def opening(value: object) -> list[dict]:
    """A prompt's messages; a text is what the user says."""
    if is_text(value):
        return [{"role": "user", "content": cells.text(value)}]
    return messages(value, "prompt")


def turns(value: object, column: str) -> list[dict]:
    """An answer's messages; a text is what the assistant says."""
    if is_text(value):
        return [{"role": "assistant", "content": cells.text(value)}]
    return messages(value, column)


def messages(value: object, column: str) -> list[dict]:
    """Checked messages of a list, or of the JSON text of one, without what is null in them."""
    found = _listed(value, f"column {column!r}", "a list of messages")
    return [_message(message, number) for number, message in enumerate(found, 1)]


def tools_of(value: object) -> list[dict] | None:
    """The JSON schemas of a list of tools, or of the JSON text of one; None for no tools."""
    if value is None or value == "":
        return None
    found = _listed(value, "column 'tools'", "a list of JSON schemas")
    for number, tool in enumerate(found, 1):
        if not isinstance(tool, dict):
            raise ValueError(f"tool {number} is {cells.named(tool)}, expected a JSON schema")
    return found or None


def _listed(value: object, what: str, expected: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{what} is {cells.named(value)}, expected {expected}") from None
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {cells.named(value)}, expected {expected}")
    return list(value)


def _message(message: object, number: int) -> dict:
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} is {cells.named(message)}, expected an object with role and content"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept:  # ShareGPT
        role, content = kept.pop("from"), kept.pop("value", None)
        if isinstance(role, str):
            role = _SHAREGPT.get(role, role)
    else:
        role, content = kept.pop("role", None), kept.pop("content", None)
    if role not in ROLES:
        raise ValueError(
            f"message {number} has the role {cells.named(role)}, expected {', '.join(ROLES)}"
            f", or ShareGPT's {', '.join(_SHAREGPT)}"
        )
    if content is None and not kept.get("tool_calls"):
        raise ValueError(f"message {number} ({role}) has no content")
    try:
        return {"role": role} | ({} if content is None else {"content": _content(content)}) | kept
    except ValueError as error:
        raise ValueError(f"message {number} ({role}): its content is {error}") from None


def _content(value: object) -> str | list[dict]:
    """A text, or parts that are texts."""
    if not isinstance(value, list | tuple):
        return cells.text(value)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"in parts, one of them {kind!r}, expected parts of type 'text'")
        parts.append({"type": "text", "text": cells.text(part.get("text"))})
    return parts


def _instruction(row: dict) -> list[dict]:
    """Alpaca's columns as turns: the input, where there is one, follows the instruction after an
    empty line; a column `system` comes first.
    """
    asked = [_cell(row, "instruction")]
    if row.get("input"):
        asked.append(_cell(row, "input"))
    said = [
        {"role": "user", "content": "\n\n".join(asked)},
        {"role": "assistant", "content": _cell(row, "output")},
    ]
    if row.get("system"):
        said.insert(0, {"role": "system", "content": _cell(row, "system")})
    return said


def _cell(row: dict, column: str) -> str:
    try:
        return cells.text(row[column])
    except ValueError as error:
        raise ValueError(f"column {column!r} is {error}") from None
