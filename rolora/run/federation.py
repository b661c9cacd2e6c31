"""The server of a job, with its clients in this process, on ranks, or elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rolora.cohort.batched import Batched
from rolora.cohort.sequential import Cohort, Sequential
from rolora.config import OPEN, Config, parse_ranks, settled
from rolora.federated import methods, term
from rolora.federated.buffered.clock import Clock
from rolora.federated.buffered.server import BufferedServer
from rolora.federated.changing import ChangingServer
from rolora.federated.checkpoint import Snapshot
from rolora.federated.delivery import Transport
from rolora.federated.guard import Norms
from rolora.federated.ledger import Ledger
from rolora.federated.rates import learning_rate
from rolora.federated.round_config import RoundConfig
from rolora.federated.server import Server
from rolora.federated.state import GlobalState
from rolora.run import asynchrony, cuda_graphs, masked, members, private
from rolora.run.evaluation import OwnFactors, personal
from rolora.run.job import Job
from rolora.transport.local import LocalTransport
from rolora.transport.ranks import Ranks, RankTransport

# No element of an honest change comes near; declares the fixed-point resolution of the sums.
MAX_CHANGE = 64.0
# Examples that a client elsewhere may say it has; with --max-weight, which says what they count.
_CLAIM = 1 << 31


def build_server(
    job: Job,
    *,
    on_round: Callable[[dict], None],
    on_checkpoint: Callable[[Snapshot], None] = lambda snapshot: None,
    on_update: Callable[[int, int, str], None] = lambda number, done, phase: None,
    on_halved: Callable[[int], None] = lambda chunk: None,
    is_recorded: Callable[[int], bool] = lambda number: True,
    ranks: Ranks | None = None,
    transport: Transport | None = None,
    ledger: Ledger | None = None,
    begun: Snapshot | None = None,
    states: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Server:
    """The server of a new run of `job`: all its clients in this process, or a rank's share of them,
    or wherever `transport` finds them. `--engine auto` that nobody has resolved is sequential.

    `begun` is where a run stands that goes on, whose name it keeps. A new one has a new name, so
    that no answer to another run is ever counted, be its options the same. `states`: a folder for
    what clients of this process keep, else it is in memory. `say` is told what of the training goes
    another way.
    """
    config = job.config
    f = config.federation
    method = methods.load(f.method, f.schedule, f.hand_over)
    most_examples, examples_of = max(map(len, job.clients)), _part_of(job)
    if transport is not None and (f.max_weight or f.membership == OPEN):  # files of their own
        most_examples, examples_of = _CLAIM, _claim_of(transport)
    if transport is None:
        transport = _transport(job, ranks, _cohort(job, on_halved, say), states)
    run, ledger = begun.run if begun else secrets.token_hex(8), ledger or Ledger()
    ledger.most = private.most_releases(config)
    rounds = private.last_round(config, ledger.releases, begun.state.round if begun else 0)
    if ranks is not None:
        run, rounds = ranks.first(run), ranks.first(rounds)
    if rounds < f.rounds:
        say(f"a round that ran again has been charged again: round {rounds} is the last one")
    return _kind(config)(
        config=_round_config(job, run, rounds, most_examples, examples_of),
        method=method,
        layout=job.layout,
        transport=transport,
        state=GlobalState.initial(job.initial_factors(), method.changes_base),
        evaluate=_evaluation(job, method, transport, ranks),
        on_round=on_round,
        on_checkpoint=on_checkpoint,
        on_update=on_update,
        is_recorded=is_recorded,
        norms=Norms(settled(config.exchange.max_update_norm)),
        ledger=ledger,
        clock=Clock(asynchrony.durations(job)),
    )


def _kind(config: Config) -> Callable[..., Server]:
    """The loop that the options ask for."""
    if config.federation.membership is not None:
        return partial(ChangingServer, members=members.of(config))
    return Server if config.asynchrony.buffer is None else BufferedServer


def _round_config(
    job: Job, run: str, rounds: int, most_examples: int, examples_of: Callable[[int], int]
) -> RoundConfig:
    """What the loop is told of the job's options."""
    config = job.config
    f, o = config.federation, config.optimisation
    return RoundConfig(
        run=run,
        rounds=rounds,
        clients=f.clients,
        clients_per_round=settled(f.clients_per_round),
        quorum=max(f.quorum, config.privacy.secure_threshold or 0),
        exchange_dtype=config.exchange.exchange_dtype,
        eval_every=config.run.eval_every,
        checkpoint_every=config.run.checkpoint_every,
        seed=config.run.seed,
        max_abs=MAX_CHANGE,
        max_examples=most_examples,
        examples_of=examples_of,
        lr=lambda phase, round: learning_rate(o, f.rounds, phase, round),
        max_weight=1 if f.weighting == "uniform" else f.max_weight,
        deadline=f.deadline,
        poisson=f.sampling == "poisson",
        rule=f.aggregation,
        trim=f.trim_fraction,
        server_momentum=f.server_momentum,
        server_lr=f.server_lr,
        privacy=private.mechanism(config),
        client_ranks=parse_ranks(f.client_ranks),
        secure=masked.settings(config),
        buffered=asynchrony.settings(config),
    )


def _part_of(job: Job) -> Callable[[int], int]:
    """How many examples a client has in the partition."""
    return lambda client: len(job.clients[client])


def _claim_of(transport: Transport) -> Callable[[int], int]:
    """How many examples a client elsewhere said it has when it was first met; none before."""
    return lambda client: transport.claims.get(client, 0)


def message_limit(job: Job) -> int:
    """Bytes that a task may have: every buffer in full and a turn, and a term where the method has
    one.
    """
    held = 16 * sum(job.layout.sizes.values())
    if methods.load(job.config.federation.method).changes_base:
        f = job.config.federation
        new_ranks = max(f.clients, settled(f.clients_per_round)) * job.config.adapter.rank
        held += 4 * job.layout.term_unit * 2 * (term.most(job.layout) + new_ranks)
    return held + (1 << 20)


def _transport(job: Job, ranks: Ranks | None, cohort: Cohort, states: Path | None) -> Transport:
    limit = message_limit(job)
    sharded = job.config.system.base_sharding  # all ranks train all clients, and the first writes
    if ranks and not sharded:
        return RankTransport(cohort, limit, ranks)
    if ranks and ranks.rank > 0:
        states = None
    return LocalTransport(cohort, limit, masked.noise(job.config), states)


def _cohort(job: Job, on_halved: Callable[[int], None], say: Callable[[str], None]) -> Cohort:
    system = job.config.system
    if system.engine != "batched":
        return Sequential(job.trainer(cuda_graphs.backward(job, say)))
    chunk = system.cohort_chunk or settled(job.config.federation.clients_per_round)
    return Batched(job.trainer(), job.report.heads, chunk, on_halved)


def _evaluation(
    job: Job, method: methods.Method, transport: Transport, ranks: Ranks | None
) -> Callable[[dict], dict[str, float]]:
    """How published factors are judged: with what clients keep, where they do; by one rank."""
    if method.kept:
        return lambda published: personal(
            job, published, OwnFactors(method, transport.client_states)
        )
    if ranks is not None and ranks.rank > 0 and not job.config.system.base_sharding:
        return lambda published: {}
    return job.evaluate
