"""A federation between owners, over Flower's Grid.

The loop is our server's, and our messages travel as bytes inside Flower's. Flower carries,
authenticates (TLS, node keys) and finds nodes; it aggregates nothing. Every node is a resident
worker (`python -m rolora.worker`) that keeps the base model loaded, or a SuperNode of Flower's that
hands messages to one. Which client a node is, is ours: its worker says so, and keeps saying so when
the node comes back under another of Flower's ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from flwr.app import Message
from torch import Tensor

from rolora.federated.aggregate import Collector
from rolora.federated.client_states import ClientStates, Sealed
from rolora.federated.delivery import Arrival
from rolora.federated.local import ClientState
from rolora.federated.state import GlobalState
from rolora.federated.tally import Tally
from rolora.federated.wire import printable
from rolora.transport.answers import BadAnswer, Bindings, arrival_of, failed, greeting_of
from rolora.transport.flower_bytes import pack, pause, received

_GREETING, _PATIENCE = 20.0, 3600.0  # seconds
_TOGETHER = 1 << 24  # bytes of messages that are pushed in one call


class Grid(Protocol):
    """What is used of Flower's grid."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


class FlowerTransport:
    """Asks the nodes of a Flower federation.

    A client without a node, or whose node fails or is late, has no update this round. The first
    round waits `gathering` seconds for nodes that are not there yet.
    """

    has_all_states = True
    leads = True

    def __init__(self, grid: Grid, gathering: float = 120.0):
        self.grid, self.gathering = grid, gathering
        # The grid tells no public keys, so a client is bound to a node's id. With node keys on,
        # the link gives an id to the owner of the key alone.
        self.bindings = Bindings()
        self.nodes: dict[int, int] = {}  # client → node, of those that answered last time
        self.met: set[int] = set()  # nodes that greeted and have not failed since
        self.asked: dict[str, int] = {}  # greeting that nobody has answered yet → node
        self.claims: dict[int, int] = {}  # client → examples that it first said it has
        self.refused: dict[int, str] = {}  # node → why its greeting was not taken
        self.client_states = ClientStates()

    def share(self, clients: Sequence[int]) -> Sequence[int]:
        return clients

    def agree(self, drawn: list[int]) -> list[int]:
        return drawn

    def common(self, turn: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return turn

    def combine(self, collector: Collector, tally: Tally) -> Tally:
        return tally

    def all_states(self) -> Sealed:
        return {}, ()  # none: a worker keeps its own

    def restore(
        self,
        state: GlobalState,
        held: dict[int, dict[str, int]],
        client_states: Mapping[int, ClientState],
    ) -> None:
        """Peers live in the workers.

        One that lost its factors refuses its next task, and is sent everything after that.
        """

    def run_round(
        self, tasks: Iterable[tuple[int, bytes]], deadline: float | None = None
    ) -> Iterator[Arrival]:
        """(client, task message) in; one arrival for every task out, in the order of arrival."""
        yield from self.ask(dict(tasks), deadline)

    def ask(self, requests: Mapping[int, bytes], deadline: float | None) -> Iterator[Arrival]:
        """Any request, in one message to a client's node."""
        self._gather(lambda waited: requests.keys() <= self.nodes.keys(), deadline)
        waiting: dict[str, int] = {}
        for batch in _batches(requests):
            here = [client for client in batch if client in self.nodes]
            names = self._push("train", {self.nodes[c]: requests[c] for c in here})
            taken = {c: name for c, name in zip(here, names, strict=False) if name}
            waiting |= {name: client for client, name in taken.items()}
            for client in batch:
                if client not in self.nodes:
                    yield failed(client, "absent", self._why_absent())
                elif client not in taken:
                    self._lose(client)
                    yield failed(client, "node failed", "Flower has not taken its task")
        end = deadline if deadline is not None else time.monotonic() + _PATIENCE
        for message_id, message in self._pull(waiting, end):
            yield self._arrival(waiting.pop(message_id), message)
        for client in waiting.values():
            self._lose(client)
            yield failed(client, "deadline", "its node has not answered in time")

    def present(self, wanted: int, least: int) -> set[int]:
        """The clients whose nodes have greeted and not failed since, once `wanted` of them are
        there and nobody who is greeted now is silent; after a while those who are. While fewer
        than `least` are there it waits as long as for the first ones.
        """
        end = time.monotonic() + self.gathering
        while True:
            self._gather(lambda waited: not waited and len(self.nodes) >= wanted, end)
            if len(self.nodes) >= least or time.monotonic() > end:
                return set(self.nodes)
            time.sleep(pause(0.0))

    def _why_absent(self) -> str:
        why = "no node answers for this client"
        return f"{why} ({len(self.refused)} greetings refused)" if self.refused else why

    def _arrival(self, client: int, message: Message) -> Arrival:
        if message.has_error():
            self._lose(client)
            return failed(client, "node failed", message.error.reason)
        return arrival_of(client, received(message))

    def _lose(self, client: int) -> None:
        """A client's node failed or is late: it is greeted anew before it gets another task."""
        node = self.nodes.pop(client, None)
        if node is not None:
            self.met.discard(node)

    def _gather(self, is_enough: Callable[[set[int]], bool], deadline: float | None) -> None:
        """Greets nodes that are new or have failed, and waits a while, until it `is_enough` given
        those of them that have not answered yet.

        A node is greeted once a round at most, and waited for in the round of its greeting only: it
        may answer in a later one. No greeting is waited for past half of a round's time: the
        other half is for those that are here.
        """
        patience = _GREETING if self.met else self.gathering
        start = time.monotonic()
        end = start + patience
        if deadline is not None:
            end = min(end, (start + deadline) / 2)
        is_first, greeted = not self.met, set[int]()
        while True:
            present = set(self.grid.get_node_ids())
            self._forget_all_but(present)
            fresh = present - self.met - greeted - set(self.asked.values())
            if fresh:
                names = self._push("query", dict.fromkeys(fresh, b"H"))
                self.asked |= dict(zip(names, fresh, strict=True))
                greeted |= fresh
            self._hear()
            waited = greeted & set(self.asked.values())
            if is_enough(waited) or time.monotonic() > end:
                return
            if not is_first and not waited:
                return  # whoever was greeted now has answered
            time.sleep(pause(time.monotonic() - start))

    def _forget_all_but(self, present: set[int]) -> None:
        self.bindings.keep(present)
        self.nodes = {client: node for client, node in self.nodes.items() if node in present}
        self.met &= present
        self.asked = {name: node for name, node in self.asked.items() if node in present}
        self.refused = {node: why for node, why in self.refused.items() if node in present}

    def _hear(self) -> None:
        """Takes the answers to greetings that have come."""
        if not self.asked:
            return
        for message in self.grid.pull_messages(list(self.asked)):
            node = self.asked.pop(message.metadata.reply_to_message_id, None)
            if node is None or message.has_error():
                continue
            try:
                greeting = greeting_of(received(message))
                self.bindings.bind(greeting.client, node)
            except BadAnswer as error:
                if self.refused.get(node) != str(error):
                    print(f"node {node} is refused: {printable(str(error), 200)}", flush=True)
                self.refused[node] = str(error)
            else:
                self.nodes[greeting.client] = node
                self.claims.setdefault(greeting.client, greeting.examples)
                self.met.add(node)
                self.refused.pop(node, None)

    def _push(self, kind: str, contents: dict[int, bytes]) -> list[str]:
        if not contents:
            return []
        messages = [
            Message(content=pack(data), message_type=kind, dst_node_id=node)
            for node, data in contents.items()
        ]
        return list(self.grid.push_messages(messages))

    def _pull(self, waiting: dict[str, int], end: float) -> Iterator[tuple[str, Message]]:
        """(id of what was asked, answer) as answers come, until `end` or until all have come."""
        left, start = set(waiting), time.monotonic()
        while left:
            for message in self.grid.pull_messages(list(left)):
                asked = message.metadata.reply_to_message_id
                if asked in left:
                    left.discard(asked)
                    yield asked, message
            if time.monotonic() > end:
                return
            if left:
                time.sleep(min(pause(time.monotonic() - start), max(end - time.monotonic(), 0)))


def _batches(requests: Mapping[int, bytes]) -> Iterator[list[int]]:
    """Clients whose messages go to the link together: a few calls for many small ones, and never
    more than a few megabytes of copies.
    """
    batch: list[int] = []
    size = 0
    for client, data in requests.items():
        batch.append(client)
        size += len(data)
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
