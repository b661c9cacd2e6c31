"""The round loop of asynchronous rounds: a round ends when its buffer is full.

ask whom nobody waits for → the next answer in simulated time → guard → its phase's buffer; K of
them → exact sum → apply → publish, as in `rolora.federated.server`

The clients of a draw are trained at once, when they are asked, and their answers are kept until
they are due: the same numbers as if they came then, and they can be trained together. Everything
between two rounds is in the book, which a checkpoint holds, so that a run that is resumed goes on
to the same bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from rolora.federated import collecting, guard, record, sampling
from rolora.federated.buffered import supply
from rolora.federated.buffered.book import Answer, Book, Flight
from rolora.federated.buffered.settings import Buffered
from rolora.federated.checkpoint import Snapshot
from rolora.federated.delivery import Arrival
from rolora.federated.guard import Rejected
from rolora.federated.local import TrainingFailed
from rolora.federated.methods import LOOKED_AT
from rolora.federated.record import Row
from rolora.federated.server import ATTEMPTS, QuorumMissed, Server
from rolora.federated.tally import Counted, Tally

_TOO_OLD = "too old"


@dataclass
class BufferedServer(Server):
    """A server whose rounds take `config.buffered.size` answers; `clients_per_round` clients train
    at any time, each of them at one order.

    With a buffer as large as that, and clients that are all as fast, its rounds are those of
    `Server`, bit for bit.
    """

    book: Book = field(default_factory=Book)

    @property
    def buffered(self) -> Buffered:
        assert self.config.buffered is not None, "else it is a Server"
        return self.config.buffered

    def snapshot(self) -> Snapshot:
        return replace(super().snapshot(), book=self.book.copy(self.clock.now))

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.book = snapshot.book.copy(self.clock.now)

    def _round(self, number: int) -> Row:
        """One round: its buffer fills, the state moves, and a row for the record comes back."""
        start, phase, tally = time.monotonic(), self.method.phase(number), Tally()
        attempts = draws = 0
        while attempts < ATTEMPTS:
            attempts += 1
            draws = self._fill(number, phase, draws, tally)
            if len(self.book.of(phase)) >= self.config.quorum:
                break
        else:
            raise QuorumMissed(
                f"round {number}: {len(self.book.of(phase))} updates of {phase} were accepted, "
                f"{self.config.quorum} are needed; "
                f"{tally.failures[-1] if tally.refused else 'no client answered'}"
            )
        taken = self.book.of(phase)[: self.buffered.size]
        del self.book.of(phase)[: self.buffered.size]
        change = self._summed(number, phase, taken) if taken else {}
        tally.accepted |= {answer.client: answer.counted for answer in taken}
        self.norms.record(phase, [answer.counted.norm for answer in taken])
        row = record.row(number, phase, tally, tally) | self._advance(number, change)
        waiting = {name: len(answers) for name, answers in self.book.waiting.items() if answers}
        return row | {
            "attempts": attempts,
            "seconds": time.monotonic() - start,
            "versions": dict(self.state.versions),
            "staleness": record.spread(number - answer.round for answer in taken),
            "training": len(self.book.training),
            "waiting": waiting,
            **self.clock.row(),
        }

    def _fill(self, number: int, phase: str, draws: int, tally: Tally) -> int:
        """Takes answers as they are due until the round has enough, or none can come any more. How
        many draws there were so far, of the round, comes back.
        """
        self._expire(number, phase, tally)
        asked: set[tuple[int, str]] = set()
        most = _failed(tally) + ATTEMPTS * self.config.clients_per_round
        while len(self.book.of(phase)) < self.buffered.size and _failed(tally) < most:
            flight = self.book.next_due()
            if flight is None or flight.due > self.clock.now:
                # All that arrive at one instant have arrived: now those are asked who are free.
                if not self._may_come(phase, asked):
                    break
                draws += self._ask(number, draws, asked, tally)
                flight = self.book.next_due()
            if flight is None:
                break
            del self.book.training[flight.client]
            self.clock.advance(flight.due)
            self._take(flight, number, tally)
            self.on_update(number, len(self.book.of(phase)), phase)
        return draws

    def _may_come(self, phase: str, asked: set[tuple[int, str]]) -> bool:
        """Whether anybody trains that phase, or may still be asked to in this round."""
        if any(flight.phase == phase for flight in self.book.training.values()):
            return True
        barred = self.book.barred(asked).values()
        return sum(phase in phases for phases in barred) < self.config.clients

    def _ask(self, number: int, draw: int, asked: set[tuple[int, str]], tally: Tally) -> int:
        """Gives orders to as many clients as may train besides those that do, each once in a round
        and phase; 1 where anybody was drawn.
        """
        config, busy = self.config, self.book.training
        free, barred = config.clients_per_round - len(busy), self.book.barred(asked)
        bound = {c for c, phases in barred.items() if phases >= self.method.phases}
        idle = [c for c in range(config.clients) if c not in busy and c not in bound]
        if free <= 0 or not idle:
            return 0
        places = sampling.cohort(config.seed, number, len(idle), free, draw)
        drawn = [idle[place] for place in places]
        under_way = self.book.supply(lambda f: not self.buffered.is_too_old(number - f.round))
        wanted = supply.needed(self.method.phase, number, self.buffered, under_way, len(drawn))
        for phase, clients in supply.assigned(wanted, drawn, barred).items():
            self._send(number, phase, clients, tally)
            asked.update((client, phase) for client in clients)
        return 1

    def _send(self, number: int, phase: str, clients: list[int], tally: Tally) -> None:
        """Orders to these clients of the factors that are published now; they train until due."""
        orders, due = self._orders(number, phase, clients), {c: self.clock.due(c) for c in clients}
        fly = partial(Flight, round=number, phase=phase, versions=dict(self.state.versions))
        for arrival in self.transport.run_round(orders, None):
            client = arrival.client
            if client not in due:
                text = f"not asked: client {client} has no order, or has answered it already"
                tally.refuse(client, "not asked", text)
                continue
            self.book.training[client] = fly(client, due=due.pop(client), answer=arrival)
        for client, when in due.items():
            silence = Arrival(client, None, TrainingFailed("no answer", "the transport has none"))
            self.book.training[client] = fly(client, due=when, answer=silence)
        tally.down += orders.sent
        # Known as soon as its answer proves it, and asked for only then.
        versions = dict(self.state.versions)  # one for all of them
        self.held |= {client: versions for client in clients}

    def _take(self, flight: Flight, number: int, tally: Tally) -> None:
        """Judges an answer that is due, by the order that it answers, into its phase's buffer."""
        expected = self._expected(flight.round, flight.phase, [flight.client])
        try:
            update, change, norm = self._judge(
                flight.answer, replace(expected, state=flight.state), tally
            )
            self._require_young(self._soonest(number, flight.phase) - flight.round)
            self._require_single(flight)
        except Rejected as verdict:
            tally.refuse(flight.client, verdict.reason, str(verdict))
            self.held.pop(flight.client, None)
        else:
            counted = Counted(update.weight, update.loss, update.examples, update.tokens, norm)
            self.book.of(flight.phase).append(Answer(flight.client, flight.round, change, counted))

    def _soonest(self, number: int, phase: str) -> int:
        """The first round from `number` on that can take an answer of a phase."""
        for ahead in range(number, number + LOOKED_AT):
            if self.method.phase(ahead) == phase:
                return ahead
        raise Rejected(_TOO_OLD, f"none of the next {LOOKED_AT} rounds trains {phase}")

    def _expire(self, number: int, phase: str, tally: Tally) -> None:
        """Drops what has become too old while it waited for a round of its phase."""
        kept = []
        for answer in self.book.of(phase):
            try:
                self._require_young(number - answer.round)
            except Rejected as verdict:
                tally.refuse(answer.client, verdict.reason, str(verdict))
            else:
                kept.append(answer)
        self.book.waiting[phase] = kept

    def _require_young(self, staleness: int) -> None:
        if self.buffered.is_too_old(staleness):
            limit = self.buffered.limit
            raise Rejected(_TOO_OLD, f"{staleness} rounds, expected at most {limit}")

    def _require_single(self, flight: Flight) -> None:
        if any(answer.client == flight.client for answer in self.book.of(flight.phase)):
            raise Rejected("duplicate", f"client {flight.client} waits in this buffer already")

    def _summed(self, number: int, phase: str, taken: list[Answer]) -> dict[str, Tensor]:
        """`Σ w σ(s) Δ / Σ w` over the answers: σ is the weight of staleness, w that of examples.

        Divided by all of w, as FedBuff divides by K: what is old makes the step shorter, and not
        only the young ones' share in it larger.
        """
        config = self.config
        bounds = guard.Bounds(config.max_abs, config.max_examples, self.buffered.size)
        collector = collecting.collector(config, self.method, self._context(phase), bounds)
        for answer in taken:
            change, staleness = answer.change, number - answer.round
            if staleness > 0:
                change = change * self.buffered.weight(staleness)
            weight = min(answer.counted.weight, config.max_weight or answer.counted.weight)
            collector.add(answer.client, change, weight)
        return collector.finish()


def _failed(tally: Tally) -> int:
    """How many answers were refused for what they are, and not for when they came."""
    return sum(reason != _TOO_OLD for _, reason, _ in tally.refused)
