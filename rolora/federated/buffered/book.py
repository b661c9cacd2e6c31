"""What is under way between two rounds: orders whose clients train, and answers that wait."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rolora.federated.delivery import Arrival
from rolora.federated.local import TrainingFailed
from rolora.federated.state import GlobalState
from rolora.federated.tally import Counted


@dataclass(frozen=True)
class Flight:
    """An order that a client trains, and the answer that arrives when it is due.

    It was given while round `round` was waited for, of the factors' `versions`; `due` is in
    simulated seconds.
    """

    client: int
    round: int
    phase: str
    versions: dict[str, int]
    due: float
    answer: Arrival

    @property
    def state(self) -> GlobalState:
        """What the guard compares an answer with: the versions, and no factors."""
        return GlobalState(self.round - 1, {}, {}, self.versions)


@dataclass(frozen=True)
class Answer:
    """An accepted answer that waits for a round of its phase; change: fp32 `[n]`."""

    client: int
    round: int
    change: Tensor
    counted: Counted


@dataclass
class Book:
    """`training`: by client, which has one order at a time. `waiting`: by phase, as they came."""

    now: float = 0.0
    training: dict[int, Flight] = field(default_factory=dict)
    waiting: dict[str, list[Answer]] = field(default_factory=dict)

    def next_due(self) -> Flight | None:
        """The order whose answer arrives first; of several at one instant the least client's."""
        flights = self.training.values()
        return min(flights, key=lambda flight: (flight.due, flight.client), default=None)

    def of(self, phase: str) -> list[Answer]:
        """The answers of a phase that wait; the list itself."""
        return self.waiting.setdefault(phase, [])

    def barred(self, asked: Iterable[tuple[int, str]]) -> dict[int, set[str]]:
        """client → phases that it is not given: of which it has an answer in the buffer, since it
        counts once in a round, or which it was `asked` for in this round already.
        """
        found: dict[int, set[str]] = defaultdict(set)
        for client, phase in asked:
            found[client].add(phase)
        for phase, answers in self.waiting.items():
            for answer in answers:
                found[answer.client].add(phase)
        return dict(found)

    def supply(self, may_count: Callable[[Flight], bool]) -> Counter[str]:
        """How many answers of each phase wait, or are under way and may still count."""
        found = Counter(flight.phase for flight in filter(may_count, self.training.values()))
        for phase, answers in self.waiting.items():
            found[phase] += len(answers)
        return found

    def copy(self, now: float) -> Book:
        """As it is at `now`; what happens later does not change it."""
        waiting = {phase: list(answers) for phase, answers in self.waiting.items()}
        return Book(now, dict(self.training), waiting)

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint's JSON holds of it; nothing of an empty one."""
        if not (self.now or self.training or any(self.waiting.values())):
            return {}
        return {
            "now": self.now,
            "training": [
                {
                    "client": flight.client,
                    "round": flight.round,
                    "phase": flight.phase,
                    "versions": flight.versions,
                    "due": flight.due,
                    "failure": _failure(flight.answer.failure),
                }
                for flight in self.training.values()
            ],
            "waiting": {
                phase: [
                    {"client": a.client, "round": a.round, "counted": asdict(a.counted)}
                    for a in answers
                ]
                for phase, answers in self.waiting.items()
                if answers
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """What its tensors hold: messages as uint8 `[bytes]`, changes as fp32 `[n]`."""
        found = {}
        for client, flight in self.training.items():
            if flight.answer.message:
                data = bytearray(flight.answer.message)
                found[f"training/{client}"] = torch.frombuffer(data, dtype=torch.uint8)
        for phase, answers in self.waiting.items():
            found |= {f"waiting/{phase}/{a.client}": a.change for a in answers}
        return found

    @classmethod
    def read(cls, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> Book:
        """The inverse of both; raises ValueError for a clock that shows no time, or a change that
        is not finite.
        """
        if not numbers:
            return cls()
        book = cls(_time(numbers["now"]))
        for row in numbers["training"]:
            client, failure = row["client"], row.pop("failure")
            found = tensors.get(f"training/{client}")
            message = found.numpy().tobytes() if found is not None else None
            reason = TrainingFailed(*failure) if failure is not None else None
            flight = Flight(**row, answer=Arrival(client, message, reason))
            _time(flight.due)
            book.training[client] = flight
        for phase, answers in numbers["waiting"].items():
            for row in answers:
                change = tensors[f"waiting/{phase}/{row['client']}"]
                if not change.isfinite().all():
                    raise ValueError("an answer that waits holds values that are not finite")
                counted = Counted(**row["counted"])
                book.of(phase).append(Answer(row["client"], row["round"], change, counted))
        return book


def _failure(failure: TrainingFailed | None) -> list[str] | None:
    if failure is None:
        return None
    return [failure.reason, str(failure).removeprefix(f"{failure.reason}: ")]


def _time(value: Any) -> float:
    if not isinstance(value, float | int) or not math.isfinite(value) or value < 0:
        raise ValueError(f"its clock shows {value!r} simulated seconds")
    return float(value)
