"""One client that stays: it holds the base model and its own examples between tasks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rolora.federated import wire
from rolora.federated.client import LocalTrainer
from rolora.federated.local import ClientState, TrainingFailed
from rolora.federated.peer import Peer
from rolora.federated.secure.noise import ClientNoise
from rolora.federated.secure.settings import MARK
from rolora.transport.masker import Masker

if TYPE_CHECKING:
    from rolora.federated.secure.roster import Identity

_REMEMBERED = 4  # rounds: more than the checkpoints that a server keeps


@dataclass
class Resident:
    """Answers task messages of at most `limit` bytes as client number `client`, and says a line for
    each. `noise`: what it adds before it masks. `identity`: how it signs its keys of masked rounds.
    `masked_only`: whether it answers no task in the clear, whatever the server asks.

    `states`: what this client kept after its last rounds, by run and number: a server that is
    resumed may ask for a round again, and finds the client as it was before it.
    """

    client: int
    trainer: LocalTrainer
    peer: Peer
    limit: int
    noise: ClientNoise | None = None
    identity: Identity | None = None
    masked_only: bool = False
    states: dict[tuple[str, int], ClientState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masker = Masker(self.client, self.limit, self.noise, self.identity)

    def answer(self, request: bytes) -> bytes:
        """`U` and an update message, or `F` and why there is none; raises nothing."""
        if request.startswith(MARK):
            return self._masking(request)
        before = self.peer.published, self.peer.versions, dict(self.states)
        start = time.monotonic()
        try:
            task = self._accepted(request)
            update = self._trained(task)
            message = self._message(task, update)
        except wire.BadMessage as error:
            return self._failed(f"task refused: {error}")
        except TrainingFailed as error:
            return self._failed(str(error))
        except Exception as error:  # whatever a hostile task brings about, the next one is served
            self.peer.published, self.peer.versions, self.states = before
            return self._failed(f"task failed: {type(error).__name__}")
        self._say(
            f"round {task.round} {task.phase}: loss {update.loss:.4f}, {update.examples} examples, "
            f"{len(request)} bytes in, {len(message)} bytes out, {time.monotonic() - start:.1f} s"
        )
        return b"U" + message

    def _message(self, task: wire.Task, update: wire.Update) -> bytes:
        """The update as it travels: in the clear, or under masks where the task asks for them."""
        if "order" in task.masking:
            return self.masker.masked(task.masking["order"], update)
        return wire.encode_update(update)

    def _masking(self, request: bytes) -> bytes:
        """The answer to a request of a masked round that is no task."""
        try:
            return b"U" + self.masker.answer(request)
        except wire.BadMessage as error:
            return self._failed(f"masking refused: {error}")
        except Exception as error:  # whatever a hostile request brings about
            return self._failed(f"task failed: {type(error).__name__}")

    def _accepted(self, request: bytes) -> wire.Task:
        """The task in a request, with the peer brought to its factors."""
        task = wire.decode_task(request, self.limit)
        if task.client != self.client:
            raise wire.BadMessage(f"a task of client {task.client} came to client {self.client}")
        if self.masked_only and "order" not in task.masking:
            raise wire.BadMessage("a task in the clear, and this client's rounds are masked")
        if task.layout != self.peer.layout.hash:
            raise TrainingFailed(
                "other layout", f"this client has {self.peer.layout.hash}, the task {task.layout}"
            )
        self.peer.receive(task)
        return task

    def _trained(self, task: wire.Task) -> wire.Update:
        """The update of a task, trained from what this client kept before that round."""
        for run, number in list(self.states):
            if run != task.run or number >= task.round:
                del self.states[run, number]
        last = self.states[max(self.states)] if self.states else {}
        update, self.states[task.run, task.round] = self.trainer.train(
            task, self.peer.published, last
        )
        for old in sorted(self.states)[:-_REMEMBERED]:
            del self.states[old]
        return update

    def _failed(self, reason: str) -> bytes:
        self._say(f"no update: {wire.printable(reason, 300)}")
        return f"F{reason}".encode(errors="replace")

    def _say(self, text: str) -> None:
        print(f"client {self.client}: {text}", flush=True)
