"""How tasks reach clients and answers come back: what the server asks of a transport."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rolora.federated.aggregate import Collector
from rolora.federated.client_states import ClientStates, Sealed
from rolora.federated.local import ClientState, TrainingFailed
from rolora.federated.state import GlobalState
from rolora.federated.tally import Tally


@dataclass(frozen=True)
class Arrival:
    """What came back from a client: its message, or the reason why there is none."""

    client: int
    message: bytes | None
    failure: TrainingFailed | None = None


class Transport(Protocol):
    """Who trains which clients, and how their answers come back: one arrival for every task, in any
    order.
    """

    has_all_states: bool  # whether `all_states` needs no other process
    leads: bool  # whether this process draws what is random and must be the same for all
    claims: dict[int, int]  # client → examples that it first said it has, where clients say so

    # what clients keep, of those that this process trains
    client_states: ClientStates

    def agree(self, drawn: list[int]) -> list[int]:
        """What the process that leads has drawn."""

    def common(self, turn: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The turn of the factors that the process that leads has computed: another's may differ in
        its last bits.
        """

    def all_states(self) -> Sealed:
        """What all clients keep between rounds, as far as it is kept here; later rounds leave what
        comes back as it is.
        """

    def restore(
        self,
        state: GlobalState,
        held: dict[int, dict[str, int]],
        client_states: Mapping[int, ClientState],
    ) -> None:
        """Goes on from a snapshot."""

    def run_round(
        self, tasks: Iterable[tuple[int, bytes]], deadline: float | None
    ) -> Iterator[Arrival]:
        """`deadline` is a time of the monotonic clock, after which nobody is waited for."""

    def ask(self, requests: Mapping[int, bytes], deadline: float | None) -> Iterator[Arrival]:
        """Requests of a masked round that are no tasks, one arrival for each; see
        `rolora.federated.secure`.
        """

    def share(self, clients: Sequence[int]) -> Sequence[int]:
        """Those of a cohort that this process asks."""

    def combine(self, collector: Collector, tally: Tally) -> Tally:
        """Makes the collector hold, and gives the tally of, everybody's share."""


class OpenTransport(Transport, Protocol):
    """A transport whose clients come and leave by themselves."""

    def present(self, wanted: int, least: int) -> set[int]:
        """The clients that are there: `wanted` of them or more, or as many as come in a while; for
        `least` it waits longer.
        """
