"""One run from a resolved configuration: the job, the server, the run folder and the reporter, put
together.
"""

from __future__ import annotations

import hashlib
import json
import resource
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import torch

from rolora import atomic
from rolora import job as jobs
from rolora.adapter.attach import explain
from rolora.cohort.batched import Batched
from rolora.cohort.choose import CannotBatch, choose
from rolora.cohort.sequential import Sequential
from rolora.config import Config, parse_ranks
from rolora.errors import BadInput, Diverged
from rolora.federated import methods, term
from rolora.federated.checkpoint import Snapshot, load_newest, prune, save_checkpoint
from rolora.federated.codec import wire_bytes
from rolora.federated.guard import Norms
from rolora.federated.privacy import Privacy
from rolora.federated.server import QuorumMissed, RoundConfig, Server
from rolora.federated.state import GlobalState
from rolora.hf import models
from rolora.run import plots
from rolora.run.folder import RunFolder
from rolora.run.progress import Reporter
from rolora.transport.local import LocalTransport
from rolora.transport.ranks import Ranks, RankTransport
from rolora_kernels import BackendUnavailable, use_backend
from rolora_kernels import explain as explain_kernels

# no element of an honest change comes near; declares the fixed-point resolution of the sums
MAX_CHANGE = 64.0
_JUDGED = 10  # clients whose own models are evaluated, where they have any
_CLAIM = (
    1 << 31
)  # examples that a client elsewhere may say it has; with --max-weight, which says what they count


def build_server(
    job: jobs.Job,
    *,
    on_round: Callable[[dict], None],
    on_checkpoint: Callable[[Server], None] = lambda server: None,
    on_update: Callable[[int, int, str], None] = lambda number, done, phase: None,
    on_halved: Callable[[int], None] = lambda chunk: None,
    ranks: Ranks | None = None,
    transport=None,
) -> Server:
    """The server of a new run of `job`: all its clients in this process, or a rank's share of them,
    or wherever `transport` finds them. `--engine auto` that nobody has resolved is sequential.
    """
    elsewhere = transport is not None
    method = methods.load(
        job.config.federation.method, job.config.federation.schedule, job.config.federation.balance
    )
    if transport is None:
        cohort, most = _cohort(job, on_halved), message_limit(job)
        transport = RankTransport(cohort, most, ranks) if ranks else LocalTransport(cohort, most)
    config, f, e = job.config, job.config.federation, job.config.exchange
    privacy = _privacy(config)
    secret = secrets.token_hex(16) if privacy else ""
    identity = {k: v for k, v in config.values().items() if k not in ("output_dir", "rounds")}
    evaluate = job.evaluate
    if method.kept:

        def evaluate(published):
            return personal(job, published, own_factors(method, transport.client_states))
    elif ranks is not None and ranks.rank > 0:

        def evaluate(published):
            return {}

    return Server(
        config=RoundConfig(
            run=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
            rounds=f.rounds,
            clients=f.clients,
            clients_per_round=f.clients_per_round,
            quorum=f.quorum,
            exchange_dtype=e.exchange_dtype,
            eval_every=config.run.eval_every,
            checkpoint_every=config.run.checkpoint_every,
            seed=config.run.seed,
            max_abs=MAX_CHANGE,
            max_weight=_CLAIM if elsewhere and f.max_weight else max(map(len, job.clients)),
            lr=job.learning_rate,
            weight_cap=1 if f.weighting == "uniform" else f.max_weight,
            deadline=f.deadline,
            poisson=f.sampling == "poisson",
            rule=f.aggregation,
            trim=f.trim_fraction,
            server_momentum=f.server_momentum,
            server_lr=f.server_lr,
            privacy=privacy,
            client_ranks=parse_ranks(f.client_ranks),
        ),
        method=method,
        layout=job.layout,
        transport=transport,
        state=GlobalState.initial(jobs.initial_factors(job), method.changes_base),
        evaluate=evaluate,
        on_round=on_round,
        on_checkpoint=on_checkpoint,
        on_update=on_update,
        norms=Norms(e.max_update_norm),
        secret=ranks.first(secret) if ranks else secret,
    )


def own_factors(method: methods.Method, client_states: dict[int, dict]) -> dict[int, dict]:
    """What clients keep of the model, by client: no moments."""
    return {
        client: {kind: state[kind] for kind in method.kept if kind in state}
        for client, state in client_states.items()
    }


def personal(
    job: jobs.Job, published: dict, client_states: dict[int, dict], examples=None
) -> dict[str, float]:
    """Metrics where clients keep factors of their own: the mean over the first clients that do, and
    the spread of the headline.
    """
    clients = [client for client, state in sorted(client_states.items()) if state][:_JUDGED]
    if not clients:
        return job.evaluate(published, examples)
    each = [job.evaluate(published | client_states[client], examples) for client in clients]
    headline = job.recipe.headline
    return {name: statistics.fmean(metrics[name] for metrics in each) for name in each[0]} | {
        f"{headline}_spread_over_clients": statistics.pstdev(metrics[headline] for metrics in each)
    }


def message_limit(job: jobs.Job) -> int:
    """Bytes that a task may have: every buffer in full and a turn, and a term where the method has
    one.
    """
    held = 16 * sum(job.layout.sizes.values())
    if methods.load(job.config.federation.method).changes_base:
        held += (
            4
            * job.layout.term_unit
            * 2
            * (term.most(job.layout) + job.config.federation.clients * job.config.adapter.rank)
        )
    return held + (1 << 20)


def _cohort(job: jobs.Job, on_halved: Callable[[int], None]) -> Sequential | Batched:
    system = job.config.system
    if system.engine == "batched":
        return Batched(
            job.trainer(),
            job.report.heads,
            system.cohort_chunk or job.config.federation.clients_per_round,
            on_halved,
        )
    return Sequential(job.trainer())


def _privacy(config: Config) -> Privacy | None:
    """The mechanism that the options name; None where they name none."""
    p, f = config.privacy, config.federation
    if p.dp_clip is None:
        return None
    return Privacy(
        p.dp_clip,
        p.dp_noise,
        p.dp_delta,
        f.clients_per_round / f.clients if f.sampling == "poisson" else 1.0,
    )


class Session:
    """Holds what one run works with; `run` is the whole of it.

    `shelf`: base models that are in memory already, for one of several runs, which then says and
    draws nothing. Without `weights` only `print_plan` works, and nothing large is read.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        resume: bool,
        quiet: bool,
        transport=None,
        shelf: models.Shelf | None = None,
        weights: bool = True,
    ):
        self.started, self.alone = time.monotonic(), shelf is None
        f = config.federation
        try:
            self.method = methods.load(f.method, f.schedule, f.balance)
        except ValueError as error:
            raise BadInput(f"--{error}") from None
        self.job = jobs.prepare(config, shelf, weights)
        self.config, self.folder, self.resume = self.job.config, folder, resume
        self.transport = transport
        self.ranks = Ranks.from_environment(self.job.device) if transport is None else None
        self.writes = self.ranks is None or self.ranks.rank == 0
        f = self.config.federation
        if self.ranks is not None and (f.aggregation != "mean" or self.method.collects):
            what = (
                f"--aggregation {f.aggregation}"
                if f.aggregation != "mean"
                else f"--method {f.method}"
            )
            raise BadInput(
                f"{what} needs every client's change in one process, and ranks exchange one sum: "
                "run it without torchrun"
            )
        if self.method.kept and (self.ranks is not None or transport is not None):
            raise BadInput(
                f"--method {f.method} keeps factors with the clients, which this run saves: run it "
                "in one process"
            )
        self.quiet = quiet
        self.reporter = Reporter(
            f.rounds, f.clients_per_round, self.job.recipe.headline, quiet or not self.writes
        )

    def run(self) -> None:
        """Trains to the last round, from the newest checkpoint where the run is resumed."""
        server, finished = self._server(), False
        try:
            forced = self.config.system.backend
            with use_backend(forced) if forced != "auto" else nullcontext():
                self.reporter.table(
                    "plan",
                    [
                        row
                        for row in self._plan()
                        if row[0] not in ("factors in fp32", "memory", "adapted modules")
                    ],
                )
                server.run()
            finished = True
        except QuorumMissed as error:
            raise Diverged(f"{error}; with a non-finite loss, lower --lr") from None
        except BackendUnavailable as error:
            raise BadInput(f"--backend: {error}") from None
        except torch.OutOfMemoryError as error:
            raise BadInput(
                f"out of memory on {self.job.device} ({str(error).splitlines()[0][:120]}): use a "
                "smaller --batch-size with "
                "--gradient-accumulation, --gradient-checkpointing or --dtype bf16"
            ) from None
        finally:
            self.reporter.close()
        if finished and self.writes:
            self._finish(server)
        if self.ranks is not None:
            self.ranks.gather("done")  # a rank that left early would end the others
            self.ranks.close()

    def print_plan(self) -> None:
        """What would be done, and what it costs."""
        self.reporter.table("plan", self._plan())

    def _server(self) -> Server:
        config, job = self.config, self.job
        snapshot, problems = (
            load_newest(self.folder.checkpoints, job.layout.hash) if self.resume else (None, [])
        )
        for problem in problems:
            self.reporter.say(f"checkpoint not used: {problem}")
        config = self.config = self.job.config = self._with_engine(config)
        server = build_server(
            job,
            transport=self.transport,
            ranks=self.ranks,
            on_halved=self._on_halved,
            on_round=self._on_round,
            on_checkpoint=self._on_checkpoint,
            on_update=lambda number, done, phase: self.reporter.client_done(number, done, phase),
        )
        if snapshot is not None:
            server.state, server.held = snapshot.state, snapshot.held
            server.norms.medians, server.secret = snapshot.norms, snapshot.secret
            server.transport.restore(snapshot.state, snapshot.held, snapshot.client_states)
        if self.ranks is not None:
            self.ranks.gather("loaded")  # before rank 0 touches what the others read
        if not self.writes:
            return server
        if self.resume:
            atomic.sweep(self.folder.path)
            prune(self.folder.checkpoints)
            self.folder.cut_after(server.state.round or -1)  # round 0 is recorded anew
            self.folder.write_config(config)
            self.reporter.say(
                f"resumed after round {server.state.round}"
                if snapshot
                else "no valid checkpoint: starting at round 0"
            )
        else:
            self.folder.create(config)
        return server

    def _with_engine(self, config: Config) -> Config:
        """The configuration with its engine settled: measured once, stored, and so the same when
        the run is resumed.
        """
        f, system = config.federation, config.system
        if self.transport is not None:
            return config.with_values(engine="sequential")  # the clients are elsewhere
        if system.engine == "sequential":
            return config
        try:
            engine = choose(
                system.engine,
                system.cohort_chunk,
                self.job.trainer(),
                self.job.report.heads,
                self.method.phase(1),
                self.job.learning_rate(self.method.phase(1), 1),
                f.clients_per_round,
            )
        except CannotBatch as reason:
            raise BadInput(f"--engine batched: {reason}: use --engine sequential") from None
        name, chunk, reason = engine.name, engine.chunk, engine.reason
        if self.ranks is not None:  # one engine for all, the first rank's
            name, chunk, reason = self.ranks.first([name, chunk, reason])
        self.reporter.say(f"engine: {name} ({reason})")
        return config.with_values(engine=name, cohort_chunk=chunk if name == "batched" else None)

    def _on_halved(self, chunk: int) -> None:
        """A chunk did not fit: the run goes on, and is resumed, with half of it."""
        self.config = self.job.config = self.config.with_values(cohort_chunk=chunk)
        if self.writes:
            self.folder.write_config(self.config)
        self.reporter.say(f"engine: out of memory, {chunk} clients at a time from here on")

    def _on_round(self, row: dict) -> None:
        if not self.writes:
            return
        row["peak_memory_bytes"] = peak_memory(self.job.device)
        self.folder.append(row)
        self.reporter.round_done(row)
        if row["round"] == 1:
            for choice in {(c.backend, c.reason) for c in explain_kernels()}:
                self.reporter.say(f"kernels: {choice[0]} ({choice[1]})")
            how = explain(self.job.model)
            self.reporter.say(
                f"layers: {sum('grouped' in line for line in how)} of {len(how)} computed in "
                "shared-input groups"
            )

    def _on_checkpoint(self, server: Server) -> None:
        states = server.transport.all_states()
        if not self.writes:
            return
        save_checkpoint(
            self.folder.checkpoints,
            Snapshot(
                server.state,
                server.held,
                states,
                self.job.layout.hash,
                server.norms.medians,
                server.secret,
            ),
        )

    def _finish(self, server: Server) -> None:
        job, rows = self.job, self.folder.rows
        published, own = server.state.published, {}
        if self.method.kept:
            own = own_factors(self.method, server.transport.client_states)
        for client, state in own.items():
            job.save_adapter(published | state, self.folder.adapter / f"client-{client:04d}")
        if not own:
            job.save_adapter(published, self.folder.adapter)
        last = rows[-1]
        test = (
            personal(job, published, own, job.test) if job.test is not None and self.alone else None
        )
        if last["eval"] is None:
            last = last | {"eval": personal(job, published, own)}
        name = job.recipe.headline
        self.folder.summarise(
            {
                "method": self.config.federation.method,
                "headline": name,
                "rounds": server.state.round,
                "eval": last["eval"],
                "test": test,
                "bytes_up": sum(r["bytes_up"] for r in rows),
                "bytes_down": sum(r["bytes_down"] for r in rows),
                "rejected": sum(sum(r["rejected"].values()) for r in rows),
                "seconds": sum(r["seconds"] for r in rows),
                "peak_memory_bytes": max(r["peak_memory_bytes"] for r in rows),
                "kernels": [asdict(c) for c in explain_kernels()],
            }
        )
        drawn = plots.draw(rows, name, self.folder.path / "plots") if self.alone else []
        held_out = (test or last["eval"])[name]
        self.reporter.table(
            "result",
            [
                (f"held-out {name.replace('_', ' ')}", f"{held_out:.4f}"),
                ("adapter", str(self.folder.adapter)),
                ("run folder", str(self.folder.path)),
                ("plots", ", ".join(p.name for p in drawn) or "none: pip install 'rolora[report]'"),
                ("seconds", f"{time.monotonic() - self.started:.0f}"),
            ],
        )
        if self.quiet and self.alone:
            print(f"held-out {name} {held_out:.4f}  {self.folder.path}", flush=True)

    def _plan(self) -> list[tuple[str, str]]:
        config, job, f = self.config, self.job, self.config.federation
        report, layout = job.report, job.layout
        sizes = [len(c) for c in job.clients]
        phases = [self.method.phase(n) for n in (1, 2)]
        per_round = [layout.travelling_size(phase) for phase in phases]
        sizes_up = dict.fromkeys(
            wire_bytes(size, config.exchange.exchange_dtype) for size in per_round
        )
        weights = models.weight_bytes(job.model, config.system.quantize)
        shapes: dict[str, int] = {}
        for layer in report.layers.values():
            text = f"{layer.out_features}x{layer.in_features}"
            shapes[text] = shapes.get(text, 0) + 1
        return [
            (
                "model",
                f"{jobs.model_name(config) if config.data.model else 'built-in'}, "
                f"{report.frozen_parameters:,} frozen parameters, "
                f"{config.system.dtype}{_stored(job.model, config)}{_liger(job.model)} on "
                f"{config.system.device}",
            ),
            (
                "adapted",
                f"{len(report.replaced)} linears "
                f"({', '.join(f'{n} of {s}' for s, n in shapes.items())}), rank "
                f"{config.adapter.rank}"
                + (
                    f", head {', '.join(report.heads)} ({report.head_parameters:,})"
                    if report.heads
                    else ""
                ),
            ),
            (
                "trained",
                f"{report.factor_parameters:,} factor parameters in all; "
                + ", ".join(
                    f"round {n}: {phase}, {size:,}"
                    for n, (phase, size) in enumerate(zip(phases, per_round, strict=True), 1)
                ),
            ),
            (
                "exchange",
                f"{config.exchange.exchange_dtype}, "
                f"{', '.join(f'{size:,} bytes' for size in sizes_up)} "
                f"up a client and round; first down {4 * sum(layout.sizes.values()):,}",
            ),
            (
                "clients",
                f"{f.clients}, {f.clients_per_round} a round, {min(sizes)} to {max(sizes)} "
                f"examples each ({f.partition}), "
                f"{len(job.evaluation)} to evaluate on",
            ),
            *([("moments", _moments(job))] if config.optimisation.optimizer == "adamw" else []),
            (
                "rounds",
                f"{f.rounds} of {f.method}, lr {config.optimisation.lr:g}"
                + (f", aggregated by {f.aggregation}" if f.aggregation != "mean" else ""),
            ),
            *(
                [("privacy", privacy_text(privacy, f.rounds))]
                if (privacy := _privacy(config))
                else []
            ),
            (
                "factors in fp32",
                ", ".join(
                    f"{kind}: {4 * size / 1024:,.0f} KiB" for kind, size in layout.sizes.items()
                ),
            ),
            (
                "memory",
                f"{weights / 2**20:,.1f} MiB weights and factors, "
                f"{8 * max(per_round) / 2**20:,.1f} MiB optimizer, activations beside",
            ),
            ("adapted modules", ", ".join(report.replaced)),
        ]


def _stored(model, config) -> str:
    """How the base is quantised, and by whom it is computed."""
    kind = models.quantized_as(model.config, config.system.quantize)
    if kind is None:
        return ""
    return f", base in {kind}" + (
        "" if models.has_bitsandbytes() else " (read without bitsandbytes)"
    )


def _moments(job: jobs.Job) -> str:
    size = jobs.carried_bytes(job.layout, len(job.clients)) / 2**20
    if job.config.optimisation.carry_moments:
        return f"AdamW's stay with the clients from round to round, {size:,.1f} MiB at most"
    return "AdamW starts anew in every round"


def _liger(model) -> str:
    kernels = getattr(model, "liger_kernels", ())
    return f", Liger's {', '.join(kernels)}" if kernels else ""


def privacy_text(privacy: Privacy, rounds: int) -> str:
    """What a mechanism promises after so many rounds, in words."""
    sampled = (
        f"Poisson sampling at {privacy.probability:g}"
        if privacy.probability < 1
        else "no amplification by sampling"
    )
    return (
        f"client-level (ε {privacy.epsilon(rounds):.3g}, δ {privacy.delta:g}) after {rounds} "
        f"rounds: clip {privacy.clip:g}, "
        f"noise multiplier {privacy.noise:g}, {sampled}"
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on the GPU what torch allocated, on the CPU the process's
    resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
