"""What happened in a round, beside the sum: who was counted, who was not and why, and the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rolora.federated.wire import Update


@dataclass(frozen=True)
class Counted:
    """What an accepted update reports, and the norm that the guard measured."""

    weight: int
    loss: float
    examples: int
    tokens: int
    norm: float


@dataclass(frozen=True)
class Summed:
    """What the clients of a masked round report together; `loss` is the sum of weighted losses."""

    weight: int
    loss: float
    examples: int
    tokens: int


NOBODY = -1  # in the place of a client, where it is the sum that is refused


@dataclass
class Tally:
    """Accepted clients by id, refusals with their reasons, bytes of messages up and down.

    In a masked round it is known of a client that it counts, and nothing else: `summed` is what all
    of them report.
    """

    accepted: dict[int, Counted | None] = field(default_factory=dict)
    summed: Summed | None = None
    refused: list[tuple[int, str, str]] = field(default_factory=list)
    up: int = 0
    down: int = 0

    def accept(self, update: Update, norm: float) -> None:
        self.accepted[update.client] = Counted(
            update.weight, update.loss, update.examples, update.tokens, norm
        )

    def refuse(self, client: int, reason: str, text: str) -> None:
        self.refused.append((client, reason, text))

    @property
    def counted(self) -> list[Counted]:
        """What accepted clients report each by itself, in the order of clients."""
        found = [self.accepted[client] for client in sorted(self.accepted)]
        return [counted for counted in found if counted is not None]

    @property
    def reasons(self) -> dict[str, int]:
        return dict(sorted(Counter(reason for _, reason, _ in self.refused).items()))

    @property
    def failures(self) -> list[str]:
        """A line for every refusal, in the order of clients."""
        ordered = sorted(self.refused, key=lambda refusal: refusal[0])
        return [f"{_name(client)}: {text}" for client, _, text in ordered]

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Tally:
        whole = cls()
        for tally in tallies:
            whole.accepted |= tally.accepted
            whole.refused += tally.refused
            whole.up, whole.down = whole.up + tally.up, whole.down + tally.down
        return whole

    def to_json(self) -> dict[str, Any]:
        return {
            "accepted": {
                str(c): list(vars(a).values()) for c, a in self.accepted.items() if a is not None
            },
            "refused": self.refused,
            "up": self.up,
            "down": self.down,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        return cls(
            {int(c): Counted(*a) for c, a in value["accepted"].items()},
            None,
            [tuple(r) for r in value["refused"]],
            value["up"],
            value["down"],
        )


def _name(client: int) -> str:
    return "the sum" if client == NOBODY else f"client {client}"
