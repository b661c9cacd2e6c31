"""The round loop.

phase → tasks → clients → guard → exact sum → apply → publish → turn → evaluate what is published →
record → checkpoint
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from rolora.federated import aggregate, collecting, guard, orders, record, sampling, term, wire
from rolora.federated.buffered.book import Book
from rolora.federated.buffered.clock import Clock
from rolora.federated.checkpoint import Snapshot
from rolora.federated.delivery import Arrival, Transport
from rolora.federated.layout import TERM, Layout, rank_of
from rolora.federated.ledger import Ledger
from rolora.federated.methods import Context, Method
from rolora.federated.orders import Held, Orders
from rolora.federated.privacy import PrivateMean
from rolora.federated.record import Row
from rolora.federated.round_config import RoundConfig
from rolora.federated.state import GlobalState
from rolora.federated.tally import Tally

ATTEMPTS = 3  # at a round that misses its quorum


class QuorumMissed(RuntimeError):
    """Too few updates were accepted, several times over; the text names the reasons."""


@dataclass
class Server:
    """The federation's state, and the loop that moves it.

    `held` is what each client is known to hold, `norms` what the guard remembers, `ledger`
    how many private releases there were, `clock` the simulated time, where there is one.
    """

    config: RoundConfig
    method: Method
    layout: Layout
    transport: Transport
    state: GlobalState
    evaluate: Callable[[dict[str, Tensor]], dict[str, float]]
    on_round: Callable[[Row], None]
    on_checkpoint: Callable[[Snapshot], None]
    on_update: Callable[[int, int, str], None] = lambda number, done, outcome: None
    is_recorded: Callable[[int], bool] = lambda number: True
    held: Held = field(default_factory=dict)
    norms: guard.Norms = field(default_factory=lambda: guard.Norms(0.0))
    ledger: Ledger = field(default_factory=Ledger)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        unprotected = self.method.collects or self.method.selects or self.method.kept
        if self.config.privacy is not None and unprotected:
            name = self.method.name
            raise ValueError(f"method {name} cannot be private: it uses more than the mean")

    def run(self) -> None:
        """Rounds `state.round + 1` to `config.rounds`, or as many as may be released; round 0 is
        evaluated before training. An interrupt saves what the last recorded round left: one that is
        cut short, in whatever place, leaves no trace.
        """
        config = self.config
        kept: list[Snapshot] = []  # of the last two rounds, as far as no checkpoint has them
        try:
            if self.state.round == 0:
                self._record_start()
                self.on_checkpoint(self.snapshot())
            for number in range(self.state.round + 1, config.rounds + 1):
                row = self._round(number)
                last = number == config.rounds or self.ledger.is_spent
                if last or number % config.eval_every == 0:
                    row["eval"] = self.evaluate(self.state.published)
                due = last or number % config.checkpoint_every == 0
                if due or self.transport.has_all_states:
                    kept = [*kept[-1:], self.snapshot()]
                self.on_round(row)
                if due:
                    self.on_checkpoint(kept[-1])
                    kept = []
                if last:
                    break
        except KeyboardInterrupt:
            recorded = [snapshot for snapshot in kept if self.is_recorded(snapshot.state.round)]
            if recorded:
                self.on_checkpoint(recorded[-1])
            raise

    def snapshot(self) -> Snapshot:
        """What a run needs to go on from here; later rounds do not change it."""
        states, segments = self.transport.all_states()
        return Snapshot(
            self.state,
            dict(self.held),
            states,
            self.layout.hash,
            {phase: list(norms) for phase, norms in self.norms.medians.items()},
            self.config.run,
            segments=segments,
            book=Book(self.clock.now),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from there."""
        self.state, self.held = snapshot.state, snapshot.held
        self.norms.medians, self.clock.now = snapshot.norms, snapshot.book.now
        self.transport.restore(snapshot.state, snapshot.held, snapshot.client_states)

    def _round(self, number: int) -> Row:
        """One round: the state moves, and a row for the record comes back."""
        start, phase = time.monotonic(), self.method.phase(number)
        before = Tally()  # attempts that missed the quorum
        for attempt in self.ledger.attempts(ATTEMPTS):
            clients = self._cohort(number, attempt)
            collector, tally = self._attempt(number, attempt, phase, clients)
            self._remember(clients, tally)
            self.clock.wait_for(clients)
            nobody_drawn = self.config.poisson and not clients  # which happens, and is no fault
            if len(tally.accepted) >= self.config.quorum or nobody_drawn:
                break
            before = Tally.merged([before, tally])
        else:
            raise QuorumMissed(
                f"round {number}: {len(tally.accepted)} of {len(clients)} updates were accepted, "
                f"{self.config.quorum} are needed; {(before.failures or ['nobody answered'])[-1]}"
            )
        self.norms.record(phase, [counted.norm for counted in tally.counted])
        # Of nobody's changes there is no mean: the round moves nothing, unless noise is due.
        moves = bool(tally.accepted) or self.config.privacy is not None
        grown = self._advance(number, collector.finish() if moves else {})
        row = record.row(number, phase, tally, Tally.merged([before, tally])) | grown
        row |= self.clock.row()
        if self.config.privacy is not None:
            row["epsilon"] = self.config.privacy.epsilon(self.ledger.releases)
        return row | {"attempts": attempt + 1, "seconds": time.monotonic() - start}

    def _attempt(
        self, number: int, attempt: int, phase: str, clients: list[int]
    ) -> tuple[aggregate.Collector, Tally]:
        """Asks a cohort; what the accepted changes add up to, and what happened."""
        config = self.config
        expected = self._expected(number, phase, clients)
        context = self._context(phase)
        collector = collecting.collector(config, self.method, context, expected.bounds)
        tally = Tally()
        deadline = None if config.deadline is None else time.monotonic() + config.deadline
        if config.secure is not None:
            from rolora.federated.secure.server import MaskedRound  # needs an optional package

            charge = self.ledger.charge if config.privacy is not None else lambda: None
            masked = MaskedRound(self.transport, expected, config.secure, attempt, deadline, charge)
            masked.run(clients, partial(self._orders, number, phase), collector)
            self.on_update(number, len(masked.tally.accepted), phase)
            return collector, masked.tally
        asked = self._orders(number, phase, self.transport.share(clients))
        for arrival in self.transport.run_round(asked, deadline):
            try:
                update, change, norm = self._judge(arrival, expected, tally)
                change = self.method.counted(context, update.client, change)
            except guard.Rejected as verdict:
                tally.refuse(arrival.client, verdict.reason, str(verdict))
            else:
                weight = min(update.weight, config.max_weight or update.weight)
                collector.add(update.client, change, weight)
                tally.accept(update, norm)
            self.on_update(number, len(tally.accepted), phase)
        tally.down = asked.sent
        self._protect(collector)
        return collector, self.transport.combine(collector, tally)

    def _context(self, phase: str) -> Context:
        config, ranks = self.config, partial(rank_of, self.config.client_ranks)
        return Context(self.state, self.layout, phase, config.seed, ranks, config.max_abs)

    def _expected(self, number: int, phase: str, clients: list[int]) -> guard.Round:
        """What every update of a round is judged by."""
        config = self.config
        return guard.Round(
            run=config.run,
            number=number,
            phase=phase,
            cohort=frozenset(clients),
            layout=self.layout,
            state=self.state,
            exchange_dtype=config.exchange_dtype,
            bounds=guard.Bounds(
                config.max_abs, config.max_examples, max(len(clients), 1), self.norms.bound(phase)
            ),
            examples_of=config.examples_of,
            budget=self._budget(),
        )

    def _orders(
        self,
        number: int,
        phase: str,
        clients: Sequence[int],
        masking: Callable[[int], Tensor] | None = None,
    ) -> Orders:
        """What those clients of a round are sent that this process asks."""
        return Orders(
            self.state,
            self.layout,
            clients,
            self.held,
            run=self.config.run,
            number=number,
            phase=phase,
            exchange_dtype=self.config.exchange_dtype,
            lr=self.config.lr(phase, number),
            masking=masking,
        )

    def _advance(self, number: int, change: dict[str, Tensor]) -> Row:
        """The state after a round's aggregate: applied, published, re-factored; what a growing term
        adds to the record comes back.
        """
        config, kinds = self.config, tuple(change)
        row: Row = {}
        state = self.state.apply(change, config.server_momentum, config.server_lr)
        if TERM in change:
            state, error = term.compress(self.layout, state)
            row = {"term_rank": term.rank(self.layout, state.master[TERM]), "term_error": error}
        state = state.publish(kinds, config.exchange_dtype, config.seed)
        turn = self.transport.common(self.method.turn(self.layout, state.published, number))
        self.state = state.turn(self.layout, turn, kinds)
        orders.forget_old(self.held, self.state.versions)
        return row

    def _budget(self) -> Callable[[int], int] | None:
        """How many ranks of all adapters a client may send, where it sends some only."""
        if not self.method.selects and self.config.client_ranks is None:
            return None
        return lambda client: sum(self.layout.budgets(rank_of(self.config.client_ranks, client)))

    def _remember(self, clients: list[int], tally: Tally) -> None:
        """What each client holds now; of who was not counted nobody knows: it is sent everything
        next time.
        """
        versions = dict(self.state.versions)  # one for all of them
        for client in clients:
            if client in tally.accepted:
                self.held[client] = versions
            else:
                self.held.pop(client, None)

    def _cohort(self, number: int, attempt: int) -> list[int]:
        config = self.config
        if config.privacy is not None and config.poisson:
            # Privacy is amplified only where nobody can know beforehand whom a round asks.
            drawn = sampling.secret_cohort(config.clients, config.clients_per_round)
            return self.transport.agree(drawn)
        return sampling.cohort(
            config.seed,
            number,
            config.clients,
            config.clients_per_round,
            attempt,
            config.poisson,
        )

    def _protect(self, collector: aggregate.Collector) -> None:
        """Adds privacy's noise, once, after the release has been charged."""
        if not isinstance(collector, PrivateMean):
            return
        self.ledger.charge()
        if self.transport.leads:
            collector.add_noise()

    def _judge(
        self, arrival: Arrival, expected: guard.Round, tally: Tally
    ) -> tuple[wire.Update, Tensor, float]:
        if arrival.failure is not None:
            raise guard.Rejected(arrival.failure.reason, str(arrival.failure).partition(": ")[2])
        if arrival.message is None:
            raise guard.Rejected("unreadable", "neither a message nor a reason")
        tally.up += len(arrival.message)
        return guard.check(arrival.message, arrival.client, expected, tally.accepted)

    def _record_start(self) -> None:
        start = time.monotonic()
        metrics = self.evaluate(self.state.published)
        self.on_round(record.start(metrics, time.monotonic() - start))
