"""One client after another on one base model: memory does not grow with the number of clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from rolora.federated.client import LocalTrainer
from rolora.federated.local import ClientState, TrainingFailed
from rolora.federated.wire import Task, Update

# A task, the published factors, the client's own state.
Order = tuple[Task, dict[str, Tensor], ClientState]
# The client, its update or why there is none, its next state.
Result = tuple[int, Update | TrainingFailed, ClientState]


class Cohort(Protocol):
    """How one process trains the clients that it was given."""

    trainer: LocalTrainer

    def train(self, orders: Iterable[Order]) -> Iterator[Result]:
        """One result for every order."""


class Sequential:
    """Trains orders in the order they come."""

    def __init__(self, trainer: LocalTrainer):
        self.trainer = trainer

    def train(self, orders: Iterable[Order]) -> Iterator[Result]:
        """One result for every order, in their order."""
        for task, published, client_state in orders:
            try:
                update, client_state = self.trainer.train(task, published, client_state)
            except TrainingFailed as failure:
                yield task.client, failure, client_state
            else:
                yield task.client, update, client_state
