"""One run from a resolved configuration: the job, the server, the run folder and the reporter, put
together.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch

from rolora import atomic
from rolora.adapter.model import explain
from rolora.config import Config, settled, whole_paths
from rolora.errors import BadInput, Diverged
from rolora.federated import client_states, compatibility, ledger
from rolora.federated.checkpoint import Snapshot, load_newest, prune, save_checkpoint
from rolora.federated.ledger import Ledger
from rolora.federated.server import QuorumMissed, Server
from rolora.hf.shelf import Shelf
from rolora.run import (
    base_model,
    cuda_graphs,
    digest,
    engine,
    identity,
    kernels,
    members,
    plan,
    result,
    samples,
    trackers,
)
from rolora.run.advice import advice
from rolora.run.federation import build_server
from rolora.run.folder import RunFolder
from rolora.run.job import prepare
from rolora.run.memory import peak_memory
from rolora.run.progress import Reporter
from rolora.run.sharded import of_a_run
from rolora.transport.ranks import Ranks
from rolora_kernels import BackendUnavailable, use_backend
from rolora_kernels import explain as explain_kernels


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
        shelf: Shelf | None = None,
        weights: bool = True,
    ):
        self.started, self.alone = time.monotonic(), shelf is None
        self.method = compatibility.load(config)
        trackers.require(config)
        config = of_a_run(config, elsewhere=transport is not None)
        self.job = prepare(whole_paths(config), shelf, weights)
        self.config, self.folder, self.resume = self.job.config, folder, resume
        samples.require_text(self.job, self.method)
        self.transport = transport
        self.ranks = Ranks.from_environment(self.job.device) if transport is None else None
        self.writes = self.ranks is None or self.ranks.rank == 0
        f, system = self.config.federation, self.config.system
        shares = self.ranks is not None and not system.base_sharding
        compatibility.require_processes(self.method, self.config, shares, transport is not None)
        members.require_elsewhere(self.config, transport is not None)
        self.quiet = quiet
        self.reporter = Reporter(
            f.rounds,
            self.config.asynchrony.buffer or settled(f.clients_per_round),
            self.job.headline,
            quiet or not self.writes,
        )

    def run(self) -> None:
        """Trains to the last round, from the newest checkpoint where the run is resumed."""
        with ExitStack() as held:
            self._run(held)

    def _run(self, held: ExitStack) -> None:
        server, finished = self._server(held), False
        self.server = server
        if self.writes:
            self.trackers = held.enter_context(
                trackers.opened(self.config, self.folder, self.resume, self.reporter.say)
            )
        try:
            forced = self.config.system.backend
            with use_backend(forced) if forced != "auto" else nullcontext():
                last = server.config.rounds
                releases = server.ledger.releases + last - server.state.round
                lines = plan.rows(self.job, self.method, (last, releases))
                self.reporter.table("plan", lines)
                explain_kernels(clear=True)  # what the engine's measurement ran is of no interest
                self.reporter.begin()
                server.run()
            finished = True
        except QuorumMissed as error:
            left = self._leave(server, str(error))
            spent = "; --dp-epsilon is spent" if server.ledger.is_spent else ""
            raise Diverged(f"{error}{spent}; with a non-finite loss, lower --lr{left}") from None
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
        if finished:
            self._finish(server)
        if self.ranks is not None:
            self.ranks.gather("done")  # a rank that left early would end the others
            self.ranks.close()

    def print_plan(self) -> None:
        """What would be done, and what it costs."""
        lines = plan.rows(self.job, self.method) + plan.details(self.job, self.method)
        self.reporter.table("plan", lines)

    def _server(self, held: ExitStack) -> Server:
        """The server, where the run stands now; the folder is held from here on."""
        config, job = self.config, self.job
        snapshot, problems = (
            load_newest(self.folder.checkpoints, job.layout.hash) if self.resume else (None, [])
        )
        for problem in problems:
            self.reporter.say(f"checkpoint not used: {problem}")
        self.examples = digest.of(job)
        if snapshot is not None:
            identity.require_same(config, snapshot.options)
            if snapshot.options.get("examples", self.examples) != self.examples:
                raise BadInput(
                    "--resume: the examples are not those that the run was begun with (rows, "
                    "labels, tokenizer, or whose they are): restore the files, or start a new run"
                )
            if snapshot.options.get("weights", job.weights) != job.weights:
                raise BadInput(
                    f"--resume: the weights of {base_model.name_of(config)} are not those that the "
                    "run was begun with: restore the files, name their --revision, or start a new "
                    "run"
                )
        say = self.reporter.say
        config = engine.settled_for(config, job, self.method, self.ranks, say)
        config = self.config = self.job.config = cuda_graphs.settled_for(config, job, say)
        server = build_server(
            job,
            transport=self.transport,
            ranks=self.ranks,
            ledger=self._ledger(),
            begun=snapshot,
            states=self.folder.checkpoints / client_states.FOLDER,
            say=say,
            on_halved=self._on_halved,
            on_round=self._on_round,
            on_checkpoint=self._on_checkpoint,
            is_recorded=self.folder.has_row,
            on_update=lambda number, done, phase: self.reporter.client_done(number, done, phase),
        )
        if snapshot is not None:
            server.restore(snapshot)
        if self.ranks is not None:
            self.ranks.gather("loaded")  # before rank 0 touches what the others read
        if not self.writes:
            return server
        if self.resume:
            held.enter_context(self.folder.locked())
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
            held.enter_context(self.folder.locked())
            if config.privacy.dp_clip is not None:
                server.ledger.begin()
        return server

    def _ledger(self) -> Ledger:
        """How many private releases this run has made; kept by the process that writes."""
        if self.config.privacy.dp_clip is None or not self.writes:
            return Ledger()
        path = self.folder.path / ledger.NAME
        return Ledger.read(path) if self.resume else Ledger(path)

    def _on_halved(self, chunk: int) -> None:
        """A chunk did not fit: the run goes on, and is resumed, with half of it."""
        self.config = self.job.config = self.config.with_values(cohort_chunk=chunk)
        if self.writes:
            self.folder.write_config(self.config)
        self.reporter.say(f"engine: out of memory, {chunk} clients at a time from here on")

    def _on_round(self, row: dict) -> None:
        self.last_metrics = row["eval"]
        if not self.writes:
            return
        row["peak_memory_bytes"] = peak_memory(self.job.device)
        self.folder.append(row)
        if row["eval"] is not None and self.config.run.samples:
            samples.write(self.job, self.server.state.published, row["round"], self.folder.path)
        self.trackers.send(self.folder.rows)
        self.reporter.round_done(row)
        early = max(4, self.config.federation.rounds // 4)
        if row["round"] == early < self.config.federation.rounds:
            self._advise()
        if row["round"] == 1:
            for line in kernels.lines(explain_kernels()):
                self.reporter.say(line)
            how = explain(self.job.model)
            self.reporter.say(
                f"layers: {sum('grouped' in line for line in how)} of {len(how)} computed in "
                "shared-input groups"
            )

    def _advise(self) -> None:
        line = advice(self.folder.rows, settled(self.config.optimisation.lr))
        if line is not None:
            self.reporter.say(line)

    def _on_checkpoint(self, snapshot: Snapshot) -> None:
        if self.writes:
            options = identity.of(self.config) | {
                "examples": self.examples,
                "weights": self.job.weights,
            }
            save_checkpoint(self.folder.checkpoints, replace(snapshot, options=options))

    def _leave(self, server: Server, why: str) -> str:
        """What a run that cannot go on leaves: its last adapter, or nothing where no round was
        done, so that the folder is free again. Says which, as the end of a line.
        """
        if not self.alone:
            return ""
        path = self.folder.path
        if not self.writes:
            if server.state.round > 0:
                self._keep_step(server)
            return ""
        if server.state.round > 0:
            self._result(server, why)
            return f"; round {server.state.round} is the last good one: {self.folder.adapter}"
        if self.resume or self.config.privacy.dp_clip is not None:
            return ""
        self.folder.discard()
        return f"; nothing was kept in {path}"

    def _keep_step(self, server: Server) -> None:
        """Computes what rank 0 does at the end, where a base lies in parts."""
        if self.config.system.base_sharding:
            published = server.state.published
            result.metrics(self.job, published, {}, self.last_metrics, self.alone)

    def _result(self, server: Server, diverged: str | None = None) -> result.Result:
        kept = server.transport.client_states
        return result.write(self.job, self.method, server, kept, self.folder, self.alone, diverged)

    def _finish(self, server: Server) -> None:
        if not self.writes:
            return self._keep_step(server)
        made = self._result(server)
        self._advise()
        name = self.job.headline
        drawn = ", ".join(path.name for path in made.plots)
        self.reporter.table(
            "result",
            [
                (f"held-out {name.replace('_', ' ')}", f"{made.held_out:.4f}"),
                ("adapter", str(self.folder.adapter)),
                ("run folder", str(self.folder.path)),
                ("plots", drawn or "none: pip install '.[report]' in your clone"),
                ("seconds", f"{time.monotonic() - self.started:.0f}"),
            ],
        )
        if self.quiet and self.alone:
            print(f"held-out {name} {made.held_out:.4f}  {self.folder.path}", flush=True)
