"""Pairs of answers as rows have them: `chosen`, `rejected`, and a `prompt` where both do not begin
with it.

Every function raises ValueError with what was found and what was expected; who reads a file adds
which row it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from rolora.data import cells
from rolora.data.conversations import (
    Continuation,
    Conversation,
    is_text,
    opening,
    tools_of,
    turns,
)

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt: both texts, or both conversations."""

    chosen: Continuation | Conversation
    rejected: Continuation | Conversation


def is_preference(row: dict) -> bool:
    """Whether the columns of a row are those of a pair."""
    return all(column in row for column in ANSWERS)


def read(row: dict) -> Preference:
    """The pair of a row; equal answers are none."""
    for column in ANSWERS:
        if row.get(column) is None:
            raise ValueError(f"it has no value for column {column!r}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if is_text(chosen) != is_text(rejected):
        raise ValueError(
            f"chosen is {cells.named(chosen)} and rejected {cells.named(rejected)}: expected two "
            "texts, or two lists of messages"
        )
    if is_text(chosen) and (prompt is None or is_text(prompt)):
        pair = _texts(prompt, cells.text(chosen), cells.text(rejected))
    else:
        pair = _conversations(prompt, chosen, rejected, tools_of(row.get("tools")))
    if pair.chosen == pair.rejected:
        raise ValueError("chosen and rejected are the same: there is nothing to prefer")
    return pair


def _texts(prompt: str | None, chosen: str, rejected: str) -> Preference:
    """Without a prompt it is what both texts begin with, up to a space."""
    if prompt is None:
        shared, shorter = 0, min(len(chosen), len(rejected))
        while shared < shorter and chosen[shared] == rejected[shared]:
            shared += 1
        if 0 < shared < shorter and chosen[shared - 1] == " ":
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return Preference(
        Continuation(cells.text(prompt), chosen), Continuation(cells.text(prompt), rejected)
    )


def _conversations(
    prompt: object, chosen: object, rejected: object, tools: list[dict] | None
) -> Preference:
    answers = [turns(chosen, "chosen"), turns(rejected, "rejected")]
    given = [] if prompt is None else opening(prompt)
    if isinstance(prompt, str) and all(_begins_with(answer, prompt) for answer in answers):
        given = []  # both answers are whole conversations, which have the prompt in them
    both = [[*given, *answer] for answer in answers]
    shared = len(given)
    while shared < min(map(len, both)) and both[0][shared] == both[1][shared]:
        shared += 1
    if shared == 0:
        raise ValueError(
            "chosen and rejected share no message and there is no column 'prompt': expected a "
            "prompt, or conversations that begin with the same messages"
        )
    return Preference(*(Conversation(whole, shared, tools) for whole in both))


def _begins_with(answer: list[dict], prompt: str) -> bool:
    """Whether a conversation holds the prompt as a message of its own before the assistant's."""
    for message in answer:
        if message["role"] == "assistant":
            return False
        if message.get("content") == prompt:
            return True
    return False
