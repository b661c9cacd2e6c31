"""One run of a job: its configuration, whether it was done, and what is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.suite import images, memory, records, texts
from benchmarks.suite.jobs import COMMON, IMAGES_ROUNDS, Job
from rolora import builtin, config, variants
from rolora.config import Config
from rolora.errors import BadInput
from rolora.experiments.digits import Digits
from rolora.recipes import metrics

VALIDATION, HELD_OUT = "validation", "held-out"
_SLICE = 0.15  # of the training data, where rates are chosen
_FIRST_TUNING_SEED = 1000
_EVALUATIONS = 3  # of a run; one that judges a rate has the last
_IMAGES_EVALUATIONS = 5
_TOGETHER = 10  # clients that are trained in one step
_IMAGES_RANK = 8


class OutOfTime(Exception):
    """No run may be begun any more."""


@dataclass(frozen=True)
class Contender:
    """A method with options, its messages' precision, and how many times the job's rank it has:
    `rolora*2` is RoLoRA at twice the rank and as much scaling, `rolora+alpha=16*2` at an α of 16.
    """

    text: str
    wire: str

    @property
    def variant(self) -> str:
        return self.text.partition("*")[0]

    @property
    def times(self) -> int:
        return int(self.text.partition("*")[2] or 1)


@dataclass
class Runner:
    """Trains jobs in this process; base models and images are read once."""

    texts: Path | None
    folder: Path = records.FOLDER
    length: float = 1.0  # of a job's rounds
    deadline: float | None = None  # by time.monotonic, after which no run is begun
    shelf: Any = None
    images: dict[str, Digits] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    memories: dict[str, memory.Memory] = field(default_factory=dict)  # of bases' frozen blocks

    def rate(self, job: Job, who: Contender) -> float:
        """The best of the job's rates on the validation slice; of equal ones that with the lowest
        loss. Runs that are needed and not recorded are done.
        """
        return _best({tried: self.run(job, who, *tried, VALIDATION) for tried in _tries(job)})

    def run(self, job: Job, who: Contender, rate: float, seed: int, on: str) -> records.Record:
        """The record of one run, done now where it is not there."""
        known = self.known(job, who, rate, seed, on)
        if known is not None and known["method"] != who.text:
            known = known | {"method": who.text}
            records.add(known, self.folder)
        if known is not None:
            return known
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        start = time.monotonic()
        if job.split is None:
            made = self._trained(self.configuration(job, who, rate, seed, on))
        else:
            made = self._two_layer_run(job, who, rate, seed, on)
        record = {
            "job": job.name,
            "side": job.side,
            "method": who.text,
            "wire": who.wire,
            "rate": rate,
            "seed": seed,
            "on": on,
            **made,
            "seconds": round(time.monotonic() - start, 1),
            "digest": self._digest(job, who, rate, seed, on),
            **records.stamp(),
        }
        records.add(record, self.folder)
        return record

    def why_not(self, job: Job, who: Contender) -> str | None:
        """Why a job cannot be trained by a method, None where it can; raises BadInput where its
        files are not there.
        """
        if job.split is None:
            self._files(job)
        else:
            self._images(job)
        try:
            self._digest(job, who, job.rates[0], 0, HELD_OUT)
        except BadInput as error:
            return str(error)
        return None

    def left(self, job: Job, methods: Sequence[str], wires: Sequence[str], seeds: int) -> int:
        """How many runs of a job are not recorded: all of a method whose rate is not chosen."""
        missing = 0
        for text in methods:
            first = Contender(text, wires[0])
            tries = {tried: self.known(job, first, *tried, VALIDATION) for tried in _tries(job)}
            there = {tried: found for tried, found in tries.items() if found is not None}
            missing += len(tries) - len(there)
            if len(there) < len(tries):
                missing += len(wires) * seeds
                continue
            rate = _best(there)
            for wire in wires:
                who = Contender(text, wire)
                done = [self.known(job, who, rate, seed, HELD_OUT) for seed in range(seeds)]
                missing += sum(found is None for found in done)
        return missing

    def known(
        self, job: Job, who: Contender, rate: float, seed: int, on: str
    ) -> records.Record | None:
        """The record of a run that was done with the same configuration."""
        found = records.read(job.name, self.folder)
        return records.with_digest(found, self._digest(job, who, rate, seed, on), who.text)

    def configuration(self, job: Job, who: Contender, rate: float, seed: int, on: str) -> Config:
        """What a run of a job that `rolora.train` could do is resolved to."""
        options = COMMON | dict(job.options) | self._files(job)
        own = variants.parse(who.variant)
        options |= own | dict(
            lr=own.get("lr", rate),
            seed=seed,
            exchange_dtype=own.get("exchange_dtype", who.wire),
            rank=options["rank"] * who.times,
            alpha=own.get("alpha", options["alpha"] * who.times),
            rounds=max(2, round(options["rounds"] * self.length)),
            validation_fraction=_SLICE if on == VALIDATION else 0.0,
            engine="batched",
        )
        times = 1 if on == VALIDATION else _EVALUATIONS
        options["eval_every"] = max(1, options["rounds"] // times)
        return config.resolve(options)

    def _digest(self, job: Job, who: Contender, rate: float, seed: int, on: str) -> str:
        if job.split is not None:
            made = self._two_layers(job, who, rate, seed, on)
            of = [job.split, on] + ([] if job.images == "digits" else [job.images])
            return records.digest(made.config.values(), *of)
        from rolora.federated import compatibility

        settled = compatibility.settle(self.configuration(job, who, rate, seed, on))
        return records.digest(records.by_size(settled).values(), self._data(job))

    def _files(self, job: Job) -> dict[str, str]:
        """A job's model and files, as options."""
        own = {
            "model": str(builtin.MODEL),
            "train_file": str(builtin.TEXT / "train.jsonl"),
            "eval_file": str(builtin.TEXT / "eval.jsonl"),
        }
        if job.text is None:
            return own
        found = texts.options(job.text, self._texts())
        on_tokens = job.options.get("task_type") == "causal-lm"
        return found | {"model": own["model"] if on_tokens else found["model"]}

    def _data(self, job: Job) -> str:
        """The digest of what a job is trained on and with."""
        files = self._files(job)
        key = "|".join(files.values())
        if key not in self.data:
            paths = [Path(files["train_file"]), Path(files["eval_file"])]
            self.data[key] = texts.digest([*paths, Path(files["model"]) / "model.safetensors"])
        return self.data[key]

    def _texts(self) -> Path:
        if self.texts is None:
            raise BadInput("this job needs --texts DIR, which --fetch DIR fills")
        return self.texts

    def _trained(self, settled: Config) -> records.Record:
        from rolora.cohort.batched import why_not
        from rolora.hf.shelf import Shelf
        from rolora.run import job as jobs
        from rolora.run.federation import build_server

        self.shelf = self.shelf or Shelf()
        made = jobs.prepare(settled, self.shelf)
        engine = "sequential" if why_not(made.trainer(), made.report.heads) else "batched"
        key = f"{settled.data.model} {settled.system.dtype} {settled.adapter.layers}"
        memory.install(made.model, self.memories.setdefault(key, memory.Memory()))
        per_round = config.settled(made.config.federation.clients_per_round)
        made.config = made.config.with_values(
            engine=engine, cohort_chunk=min(_TOGETHER, per_round) if engine == "batched" else None
        )
        rows: list[dict[str, Any]] = []
        server = build_server(made, on_round=rows.append)
        return _record(rows, made, _ended(server))

    def _images(self, job: Job) -> Digits:
        if job.images not in self.images:
            self.images[job.images] = images.load(job.images, self.texts)
        return self.images[job.images]

    def _two_layers(self, job: Job, who: Contender, rate: float, seed: int, on: str) -> Any:
        """A run's job on images (`rolora.run.job.Job`)."""
        from rolora.experiments.two_layers import Setting, prepare

        assert job.split is not None
        own = self._images(job)
        rounds = max(2, round(IMAGES_ROUNDS[job.images] * self.length))
        text = f"{who.variant}+exchange-dtype={who.wire}"
        setting = Setting(text, job.split, rate, seed, rounds, _IMAGES_RANK * who.times, job.images)
        made = prepare(setting, own, "held" if on == VALIDATION else "test")
        made.config = made.config.with_values(eval_every=max(1, rounds // _IMAGES_EVALUATIONS))
        return made

    def _two_layer_run(
        self, job: Job, who: Contender, rate: float, seed: int, on: str
    ) -> records.Record:
        from rolora.run.federation import build_server

        made = self._two_layers(job, who, rate, seed, on)
        rows: list[dict[str, Any]] = []
        server = build_server(made, on_round=rows.append)
        server.norms.multiple = 0.0  # at large rates honest changes differ by more than a bound
        return _record(rows, made, _ended(server))


def _ended(server: Any) -> bool:
    """Runs a server to its end; whether it diverged on the way."""
    from rolora.federated.server import QuorumMissed

    try:
        server.run()
    except QuorumMissed:
        return True
    return False


def _tries(job: Job) -> list[tuple[float, int]]:
    """(rate, seed) of the runs that judge a job's rates."""
    seeds = range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + job.tuning)
    return [(rate, seed) for rate in job.rates for seed in seeds]


def _best(found: Mapping[tuple[float, int], records.Record]) -> float:
    """The rate of the best mean, and of equal ones that of the lowest loss."""
    scores: dict[float, tuple[float, float]] = {}
    for rate in {rate for rate, _ in found}:
        own = [record for (other, _), record in found.items() if other == rate]
        value = sum(records.final(record) for record in own) / len(own)
        loss = sum(_loss(record) for record in own) / len(own)
        scores[rate] = metrics.rank(own[0]["headline"], value, loss)
    return min(sorted(scores), key=lambda rate: scores[rate])


def _loss(record: records.Record) -> float:
    return math.inf if record["loss"] is None else float(record["loss"])


def _record(rows: list[dict[str, Any]], made: Any, diverged: bool) -> records.Record:
    """What is kept of a job's rows; `rounds` are those it should have had."""
    headline, federation = made.headline, made.config.federation
    curve, up, both = [], 0, 0
    for row in rows:
        up, both = up + row["bytes_up"], both + row["bytes_up"] + row["bytes_down"]
        if row["eval"]:
            curve.append([row["round"], up / 1e6, both / 1e6, round(row["eval"][headline], 4)])
    evaluated = [row["eval"] for row in rows if row["eval"]]
    return {
        "headline": headline,
        "rounds": federation.rounds,
        "diverged": diverged,
        "loss": None if diverged else round(evaluated[-1]["loss"], 4),
        "curve": curve,
        "clients": federation.clients,
    }
