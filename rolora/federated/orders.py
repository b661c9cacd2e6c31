"""The task messages of a round: each client's order, with what brings that client up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from rolora.federated import peer, wire
from rolora.federated.layout import Layout
from rolora.federated.state import GlobalState

Held = dict[int, dict[str, int]]  # client → kind → the version that it is known to hold


def useful(versions: dict[str, int], held: dict[str, int]) -> dict[str, int]:
    """What of a peer's versions is current or one publication behind: of all others it is sent
    the whole buffer, as a new peer is.
    """
    return {kind: own for kind, own in held.items() if own >= versions.get(kind, own) - 1}


def forget_old(held: Held, versions: dict[str, int]) -> None:
    """Leaves of `held` what makes a difference to a task, so that it does not grow with the clients
    that were ever asked. Clients of one round share what stands there, which is not changed.
    """
    kept: dict[int, dict[str, int]] = {}
    for client, own in list(held.items()):
        left = kept.setdefault(id(own), useful(versions, own))
        if not left:
            del held[client]
        elif left != own:
            held[client] = left


class Orders:
    """(client, message) of every client that is asked, each made when a transport takes it: those
    of new clients hold all factors, and a cohort may be large.

    `sent` counts the bytes of those that were taken. `masking(client)`: the bytes of the order to
    answer under masks, in a masked round.
    """

    def __init__(
        self,
        state: GlobalState,
        layout: Layout,
        clients: Sequence[int],
        held: Held,
        *,
        run: str,
        number: int,
        phase: str,
        exchange_dtype: str,
        lr: float,
        masking: Callable[[int], Tensor] | None = None,
    ):
        self.state, self.layout, self.clients, self.held = state, layout, clients, held
        self.run, self.number, self.phase = run, number, phase
        self.exchange_dtype, self.lr = exchange_dtype, lr
        self.masking = masking
        self.sent = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        fingerprints = self.state.fingerprints()
        for client in self.clients:
            message = wire.encode_task(self._task(client, fingerprints))
            self.sent += len(message)
            yield client, message

    def _task(self, client: int, fingerprints: dict[str, str]) -> wire.Task:
        full, last = peer.what_is_missing(self.state, self.held.get(client, {}))
        return wire.Task(
            run=self.run,
            round=self.number,
            phase=self.phase,
            client=client,
            layout=self.layout.hash,
            versions=self.state.versions,
            fingerprints=fingerprints,
            exchange_dtype=self.exchange_dtype,
            lr=self.lr,
            full=full,
            delta={kind: b.wire for kind, b in last.items() if b.wire is not None},
            turn={kind: b.turn for kind, b in last.items() if b.turn is not None},
            masking={} if self.masking is None else {"order": self.masking(client)},
        )
