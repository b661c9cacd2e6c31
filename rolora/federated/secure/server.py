"""The server's part of a masked round: it learns the sum of those that stayed, and who they are.

keys → shares → masked terms → unmasking → the sum, which takes the place of the plain one bit for
bit. Too few answers at any step end the attempt before anything is unmasked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rolora.federated.aggregate import Collector, Mean
from rolora.federated.delivery import Arrival, Transport
from rolora.federated.guard import Rejected, Round
from rolora.federated.orders import Orders
from rolora.federated.secure import crypto, graph, messages
from rolora.federated.secure.messages import EXTRAS, KEY, LOSS_STEPS, Message
from rolora.federated.secure.settings import Secure
from rolora.federated.secure.unmasking import Holding, joined
from rolora.federated.tally import NOBODY, Summed, Tally
from rolora.federated.wire import BadMessage

_HEADERS = 1 << 16  # bytes of a message beside its tensors


OrdersOf = Callable[[list[int], Callable[[int], Tensor]], Orders]
A = TypeVar("A", messages.Keys, messages.Sealed, messages.Unmasking, messages.Masked)


@dataclass
class MaskedRound:
    """One attempt at a round under masks.

    The tally says what happened; nobody is accepted in it where the attempt failed.
    """

    transport: Transport
    expected: Round
    settings: Secure
    attempt: int
    deadline: float | None
    before_release: Callable[[], None] = lambda: None  # called once, before anything is unmasked
    tally: Tally = field(default_factory=Tally)
    signatures: dict[int, bytes] = field(default_factory=dict)  # under the clients' keys
    _began: float = 0.0

    def run(self, clients: list[int], orders_of: OrdersOf, mean: Collector) -> None:
        """Every exchange of the attempt; `mean`, a plain one, is given the sum.

        `orders_of(clients, masking)` makes the training tasks of those clients, with the bytes that
        `masking(client)` gives.
        """
        assert isinstance(mean, Mean)  # what else there is needs every client's change
        self._began = time.monotonic()
        public = self._keys(clients)
        if self._too_few(public):
            return
        around = graph.neighbours(public, self.settings.degree, graph.key_of(self._session))
        sealed = self._shares(public, around)
        if self._too_few(sealed):
            return
        total, stayed = self._terms(sealed, around, orders_of, mean)
        if self._too_few(stayed):
            return
        self.before_release()
        try:
            self._unmask(total, stayed, public, around, set(sealed))
            self._count(total, stayed, mean)
        except Rejected as verdict:
            self.tally.refuse(NOBODY, verdict.reason, str(verdict))

    def _until(self, part: float) -> float | None:
        """When an exchange ends that may take the round up to that part of its time: who is gone in
        one must leave time for those that stay.
        """
        if self.deadline is None:
            return None
        return self._began + part * (self.deadline - self._began)

    @property
    def _session(self) -> tuple[str, int, int]:
        return self.expected.run, self.expected.number, self.attempt

    def _too_few(self, clients: Iterable[int]) -> bool:
        return len(list(clients)) < self.settings.threshold

    def _keys(self, clients: list[int]) -> dict[int, bytes]:
        """Client → its public keys and commitment; of those that signed them, where they must."""
        wanted = {client: messages.KeysWanted(*self._session, client) for client in clients}
        found, roster = {}, self.settings.roster
        for client, answer in self._ask(wanted, messages.Keys, 3 * KEY + messages.SIGNATURE, 0.2):
            keys, signature = messages.raw(answer.keys), messages.raw(answer.signature)
            try:
                _require_short(signature)
                if roster is not None:
                    roster.require(client, self._session, keys, signature)
            except BadMessage as error:
                self.tally.refuse(client, "not signed", str(error))
                continue
            found[client], self.signatures[client] = keys, signature
        return found

    def _shares(
        self, public: dict[int, bytes], around: Mapping[int, list[int]]
    ) -> dict[int, dict[int, bytes]]:
        """Client → neighbour → what the client sealed for it."""
        clients = torch.tensor(sorted(public))
        keys = messages.rows([public[client] for client in sorted(public)], 3 * KEY)
        signed = messages.signature_rows([self.signatures[client] for client in sorted(public)])
        threshold, degree = self.settings.threshold, self.settings.degree or 0
        wanted = {
            client: messages.SharesWanted(
                *self._session, client, threshold, degree, clients, keys, signed
            )
            for client in public
        }
        found = {}
        for client, answer in self._ask(
            wanted, messages.Sealed, len(public) * messages.PAIR * 2, 0.4
        ):
            to = answer.to.tolist()
            if to != around[client] or len(answer.sealed) != len(to):
                self.tally.refuse(client, "wrong shares", "they are not for its neighbours")
                continue
            found[client] = dict(zip(to, map(messages.raw, answer.sealed), strict=True))
        return found

    def _terms(
        self,
        sealed: dict[int, dict[int, bytes]],
        around: Mapping[int, list[int]],
        orders_of: OrdersOf,
        mean: Mean,
    ) -> tuple[Tensor, list[int]]:
        """(the sum of all masked terms, whose they are)."""
        size = self.expected.layout.travelling_size(self.expected.phase) + EXTRAS
        total, stayed = torch.zeros(size, dtype=torch.int64), []

        def masking(client: int) -> Tensor:
            senders = [other for other in around[client] if other in sealed]
            parts = [sealed[sender][client] for sender in senders]
            wanted = messages.MaskingWanted(
                *self._session,
                client,
                self.expected.exchange_dtype,
                mean.sum.max_abs,
                mean.sum.max_weight,
                mean.sum.max_terms,
                torch.tensor(senders, dtype=torch.int64),
                messages.rows(parts, messages.PAIR),
            )
            return messages.blob(messages.encode(wanted))

        orders = orders_of(sorted(sealed), masking)
        arrivals = self.transport.run_round(orders, self._until(0.8))
        for client, answer in self._answers(arrivals, messages.Masked, 8 * size):
            try:
                self._require_ours(answer, size)
            except Rejected as verdict:
                self.tally.refuse(client, verdict.reason, str(verdict))
                continue
            total += answer.values
            stayed.append(client)
        self.tally.down += orders.sent
        return total, sorted(stayed)

    def _require_ours(self, answer: messages.Masked, size: int) -> None:
        """Raises Rejected for a masked term that is not of this round: all that can be judged."""
        expected = self.expected
        for name, found, wanted in (
            ("other phase", answer.phase, expected.phase),
            ("other layout", answer.layout, expected.layout.hash),
            ("stale factors", answer.versions, expected.state.versions),
            ("wrong shape", len(answer.values), size),
        ):
            if found != wanted:
                raise Rejected(name, f"{str(found)[:80]}, expected {wanted}")

    def _unmask(
        self,
        total: Tensor,
        stayed: list[int],
        public: dict[int, bytes],
        around: Mapping[int, list[int]],
        shared: set[int],
    ) -> None:
        """Takes all masks off `total`; raises Rejected where the shares do not suffice."""
        here = set(stayed)
        asked = {client: sorted({*around[client], client} & shared) for client in stayed}
        wanted = {
            client: messages.UnmaskingWanted(
                *self._session,
                client,
                torch.tensor([c for c in near if c in here], dtype=torch.int64),
                torch.tensor([c for c in near if c not in here], dtype=torch.int64),
            )
            for client, near in asked.items()
        }
        holding = Holding(self.settings.threshold, len(public), around)
        most = len(public) * KEY * 4
        for client, answer in self._ask(wanted, messages.Unmasking, most, 1.0):
            order = wanted[client]
            if (len(answer.seeds), len(answer.keys)) != (len(order.stayed), len(order.gone)):
                self.tally.refuse(client, "wrong shares", "not those that it was asked for")
                continue
            holding.take(client, order, answer)
        for client in stayed:
            right = public[client][2 * KEY :]
            seed = joined(holding, "seed", client, right, crypto.commitment)
            crypto.add_mask(total, seed, -1)
        for gone in sorted(shared - here):
            near = [client for client in around[gone] if client in here]
            if not near:
                continue
            right = public[gone][KEY : 2 * KEY]
            key = joined(holding, "mask key", gone, right, crypto.public_of)
            for client in near:
                secret = crypto.agreed(key, public[client][KEY : 2 * KEY], "mask")
                crypto.add_mask(total, secret, -1 if client < gone else 1)

    def _count(self, total: Tensor, stayed: list[int], mean: Mean) -> None:
        """Hands the sum over; raises Rejected for one that terms within bounds cannot have."""
        weight, loss, examples, tokens = total[-EXTRAS:].tolist()
        values, most = total[:-EXTRAS], sum(map(self._heaviest(mean), stayed))
        if not len(stayed) <= weight <= most or examples < 0 or tokens < 0:
            raise Rejected("bad sum", f"a weight of {weight}, expected {len(stayed)} to {most}")
        bound = mean.sum.max_abs * weight * 2.0**-mean.sum.exponent + len(stayed) + mean.slack
        if values.numel() and values.double().abs().max().item() > bound:
            raise Rejected("bad sum", "it is over what its clients may send together")
        mean.sum.replace(torch.cat([values, torch.tensor([weight, len(stayed)])]))
        self.tally.accepted = dict.fromkeys(stayed)
        self.tally.summed = Summed(weight, loss / LOSS_STEPS, examples, tokens)

    def _heaviest(self, mean: Mean) -> Callable[[int], int]:
        """What a client may weigh at most."""
        return lambda client: min(mean.sum.max_weight, max(self.expected.examples_of(client), 1))

    def _ask(
        self, wanted: Mapping[int, Message], kind: type[A], most: int, part: float
    ) -> Iterator[tuple[int, A]]:
        """Sends requests that are no tasks; (client, answer) of those that answer rightly, until
        that part of the round's time is over.
        """
        requests = {client: messages.request(order) for client, order in wanted.items()}
        self.tally.down += sum(map(len, requests.values()))
        return self._answers(self.transport.ask(requests, self._until(part)), kind, most)

    def _answers(
        self, arrivals: Iterable[Arrival], kind: type[A], most: int
    ) -> Iterator[tuple[int, A]]:
        """(client, answer), each client once; what is no answer is refused by name."""
        seen: set[int] = set()
        for arrival in arrivals:
            try:
                answer = self._read(arrival, kind, most, seen)
            except Rejected as verdict:
                self.tally.refuse(arrival.client, verdict.reason, str(verdict))
            else:
                seen.add(arrival.client)
                yield arrival.client, answer

    def _read(self, arrival: Arrival, kind: type[A], most: int, seen: set[int]) -> A:
        if arrival.failure is not None:
            raise Rejected(arrival.failure.reason, str(arrival.failure).partition(": ")[2])
        if arrival.message is None:
            raise Rejected("unreadable", "neither a message nor a reason")
        self.tally.up += len(arrival.message)
        try:
            answer = messages.decode(kind, arrival.message, most + _HEADERS)
        except BadMessage as error:
            raise Rejected("unreadable", str(error)) from None
        if answer.session != self._session:
            raise Rejected("stale or replayed", f"made for {answer.round}.{answer.attempt}")
        if answer.client != arrival.client:
            raise Rejected("other client", f"it answered as client {answer.client}")
        if arrival.client in seen:
            raise Rejected("duplicate", "it has answered already")
        return answer


def _require_short(signature: bytes) -> None:
    if len(signature) >= messages.SIGNATURE:
        raise BadMessage(f"a signature of {len(signature)} bytes")
