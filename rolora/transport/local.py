"""All clients in this process.

The bytes are the same as over a network, and so is what each client has to hold.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

from torch import Tensor

from rolora.cohort.sequential import Cohort, Order
from rolora.federated import orders, wire
from rolora.federated.aggregate import Collector
from rolora.federated.client_states import ClientStates, Sealed
from rolora.federated.delivery import Arrival
from rolora.federated.local import ClientState, TrainingFailed
from rolora.federated.peer import Copies, Peer
from rolora.federated.secure.noise import ClientNoise
from rolora.federated.state import GlobalState
from rolora.federated.tally import Tally
from rolora.transport.masker import Masker


class LocalTransport:
    """Delivers tasks to in-process peers and yields their answers as they come."""

    has_all_states = True
    leads = True

    def __init__(
        self,
        cohort: Cohort,
        message_limit: int,
        noise: ClientNoise | None = None,
        states: Path | None = None,
    ):
        self.cohort = cohort
        self.message_limit, self.noise = message_limit, noise
        self.claims: dict[int, int] = {}  # nobody has to ask: the partition is here
        self.peers: dict[int, Peer] = {}
        # What clients hold is nearly always the same: one copy for all of them.
        self._copies: Copies = WeakValueDictionary()
        self.client_states = ClientStates(states)
        self._states, self._versions = states, dict[str, int]()
        self.maskers: dict[int, Masker] = {}

    def run_round(
        self, tasks: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[Arrival]:
        """(client, task message) in; one arrival for every task out.

        A client whose turn has not come by the `deadline` is not trained.
        """
        refused: list[Arrival] = []
        masking: dict[int, Tensor] = {}
        for client, result, client_state in self.cohort.train(
            self._orders(tasks, deadline, refused, masking)
        ):
            self.client_states[client] = client_state
            if isinstance(result, TrainingFailed):
                yield Arrival(client, None, result)
            elif client in masking:
                yield self._masked(client, masking.pop(client), result)
            else:
                yield Arrival(client, wire.encode_update(result))
        yield from refused

    def _masked(self, client: int, order: Tensor, update: wire.Update) -> Arrival:
        try:
            return Arrival(client, self.maskers[client].masked(order, update))
        except wire.BadMessage as error:
            return Arrival(client, None, TrainingFailed("masking refused", str(error)))

    def ask(self, requests: Mapping[int, bytes], deadline: float | None) -> Iterator[Arrival]:
        for client, request in requests.items():
            masker = self.maskers.setdefault(client, Masker(client, self.message_limit, self.noise))
            try:
                yield Arrival(client, masker.answer(request))
            except wire.BadMessage as error:
                yield Arrival(client, None, TrainingFailed("masking refused", str(error)))

    def share(self, clients: Sequence[int]) -> Sequence[int]:
        return clients

    def agree(self, drawn: list[int]) -> list[int]:
        return drawn

    def common(self, turn: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return turn

    def combine(self, collector: Collector, tally: Tally) -> Tally:
        return tally

    def all_states(self) -> Sealed:
        """What all clients keep between rounds."""
        return self.client_states.sealed()

    def _orders(
        self,
        tasks: Iterable[tuple[int, bytes]],
        deadline: float | None,
        refused: list[Arrival],
        masking: dict[int, Tensor],
    ) -> Iterator[Order]:
        """What the cohort trains; who cannot be trained is `refused`, `masking` has the orders of
        those that answer under masks.
        """
        for client, message in tasks:
            if deadline is not None and time.monotonic() > deadline:
                refused.append(
                    Arrival(
                        client,
                        None,
                        TrainingFailed("deadline", "the round's time was over before its turn"),
                    )
                )
                continue
            try:
                task = wire.decode_task(message, self.message_limit)
                self._forget_old(task.versions)
                if client not in self.peers:
                    self.peers[client] = self._peer()
                peer = self.peers[client]
                peer.receive(task)
            except wire.BadMessage as error:
                refused.append(Arrival(client, None, TrainingFailed("task refused", str(error))))
                continue
            if task.masking:
                masking[client] = task.masking["order"]
            yield task, peer.published, self.client_states.get(client, {})

    def restore(
        self,
        state: GlobalState,
        held: dict[int, dict[str, int]],
        client_states: Mapping[int, ClientState],
    ) -> None:
        """Puts every peer back to the versions it held.

        The published buffers, or those one publication earlier. What is older is left empty,
        because it would be replaced in full anyway.
        """
        if isinstance(client_states, ClientStates) and client_states.folder == self._states:
            self.client_states = client_states
        else:
            self.client_states = ClientStates(self._states, dict(client_states))
        self.peers = {client: self._peer() for client in held}
        for client, versions in held.items():
            for kind, version in versions.items():
                if version == state.versions[kind]:
                    self.peers[client].published[kind] = state.published[kind]
                elif version == state.versions[kind] - 1:
                    self.peers[client].published[kind] = state.broadcast[kind].base
            self.peers[client].versions = dict(versions)

    def _forget_old(self, versions: dict[str, int]) -> None:
        """Lets peers go of what a task replaces in full anyway: a cohort drawn from many clients
        would leave a copy of every round behind.
        """
        if versions == self._versions:
            return
        self._versions = versions
        for client, peer in list(self.peers.items()):
            peer.keep(orders.useful(versions, peer.versions))
            if not peer.published:
                del self.peers[client]

    def _peer(self) -> Peer:
        return Peer(self.cohort.trainer.layout, copies=self._copies)
