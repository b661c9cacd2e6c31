"""One client after another on one base model: memory does not grow with the number of clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from rolora.federated.client import ClientState, LocalTrainer, TrainingFailed
from rolora.federated.wire import Task, Update

Order = tuple[
    Task, dict[str, Tensor], ClientState
]  # task, published factors, the client's own state


class Sequential:
    """Trains orders in the order they come."""

    def __init__(self, trainer: LocalTrainer):
        self.trainer = trainer

    def train(
        self, orders: Iterable[Order]
    ) -> Iterator[tuple[int, Update | TrainingFailed, ClientState]]:
        """(client, update or failure, the client's next state), one for every order."""
        for task, published, client_state in orders:
            try:
                update, client_state = self.trainer.train(task, published, client_state)
            except TrainingFailed as failure:
                yield task.client, failure, client_state
            else:
                yield task.client, update, client_state
