"""What nodes of other owners answer: hostile bytes, read without ever raising."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rolora.federated.delivery import Arrival
from rolora.federated.local import TrainingFailed
from rolora.federated.wire import printable

# a worker's words
REASONS = ("task refused", "task failed", "other layout", "non-finite loss", "masking refused")
_LONGEST = 200  # characters of a detail


class BadAnswer(ValueError):
    """An answer that cannot be read; the text names why."""


def arrival_of(client: int, answer: object) -> Arrival:
    """The update in a worker's answer, or why there is none: one of fixed words, and a detail."""
    if not isinstance(answer, bytes):
        return failed(client, "unreadable answer", "our record of bytes is missing")
    if answer[:1] == b"U":
        return Arrival(client, answer[1:])
    reason, _, detail = answer[1:1024].decode(errors="replace").partition(": ")
    if answer[:1] != b"F" or reason not in REASONS:
        return failed(client, "unreadable answer", "neither an update nor a known reason")
    return failed(client, reason, detail)


def failed(client: int, reason: str, detail: object) -> Arrival:
    """An arrival without an update. reason: a fixed word of ours; detail: may be hostile."""
    return Arrival(client, None, TrainingFailed(reason, printable(str(detail), _LONGEST)))


@dataclass(frozen=True)
class Greeting:
    """Which client a node says it is, and how many examples it says it has."""

    client: int
    examples: int


def greeting_of(answer: object) -> Greeting:
    """What a node says of itself; raises BadAnswer for anything but a greeting."""
    if not isinstance(answer, bytes):
        raise BadAnswer("our record of bytes is missing")
    try:
        hello = json.loads(answer[: 1 << 16])
    except (ValueError, RecursionError):
        raise BadAnswer("not JSON") from None
    if not isinstance(hello, dict):
        raise BadAnswer("no JSON object")
    client, examples = hello.get("client"), hello.get("examples")
    if type(client) is not int or not 0 <= client < 1 << 31:
        raise BadAnswer("no client number")
    if type(examples) is not int or not 1 <= examples < 1 << 31:
        raise BadAnswer("no number of examples")
    return Greeting(client, examples)


@dataclass
class Bindings:
    """Which node is which client: the first that says so, for as long as it is known."""

    nodes: dict[int, int] = field(default_factory=dict)  # client → node

    def keep(self, present: set[int]) -> None:
        """Forgets the nodes that are gone, whose clients may come back from others."""
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}

    def bind(self, client: int, node: int) -> None:
        """Raises BadAnswer where another node is the client already."""
        first = self.nodes.setdefault(client, node)
        if first != node:
            raise BadAnswer(f"it says that it is client {client}, which node {first} is")
