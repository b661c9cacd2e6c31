"""What is kept of every run: a line of JSON in `benchmarks/results/suite/<job>.jsonl`.

A record holds the job, its side, the method, the wire, the rate, the seed, what it was judged on,
the curve (round, megabytes up, megabytes both ways, the headline, at every evaluation), the digest
of its whole configuration, and the commit, versions, machine and date. A run whose digest is there
is not repeated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.waiting import cpu
from rolora import atomic
from rolora.config import Config
from rolora.errors import BadInput
from rolora.recipes import metrics
from rolora.run import defaults

FOLDER = Path(__file__).parent.parent / "results" / "suite"
Record = dict[str, Any]
_NEEDED = {
    *("job", "side", "method", "wire", "rate", "seed", "on", "digest"),
    *("headline", "rounds", "curve", "loss", "diverged"),
}
# What does not change the numbers of a run, beyond the rounding of batched matmuls.
_ASIDE = {
    "output_dir",
    "engine",
    "cohort_chunk",
    "threads",
    "device",
    "checkpoint_every",
    "backend",
}
# What every option was by default when the suite began. One at that value is left out of digests,
# and so is a younger one at its own default: options that come later leave old records as they are,
# and a default that changes does not.
_DEFAULTS = Path(__file__).with_name("defaults.json")
_PLACES = {"model", "train_file", "eval_file"}  # their contents count, not where they lie


def digest(options: Mapping[str, Any], *of_data: str) -> str:
    """16 hex digits that tell a configuration and its data from every other."""
    usual = _usual()
    kept = {k: v for k, v in options.items() if k not in _ASIDE | _PLACES}
    kept = {k: v for k, v in kept.items() if k not in usual or v != usual[k]}
    text = json.dumps([sorted(kept.items()), of_data], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def by_size(settled: Config) -> Config:
    """A configuration with what a job decides by its size (`rolora.run.defaults`): here all is
    small.
    """
    f = settled.federation
    made = defaults.moments(settled, f.clients_per_round in (None, f.clients), True, True)
    if made.federation.equal_factors:
        return made
    # As records had it when moments were all that was to decide.
    return made.with_values(carry_moments=settled.optimisation.carry_moments)


@functools.cache
def _usual() -> dict[str, Any]:
    return Config().values() | json.loads(_DEFAULTS.read_text(encoding="utf-8"))


def read(job: str, folder: Path = FOLDER) -> list[Record]:
    """The records of a job, oldest first; raises BadInput for a file that is damaged."""
    path = folder / f"{job}.jsonl"
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not record.keys() >= _NEEDED:
                raise ValueError("no record")
        except ValueError:
            raise BadInput(
                f"{path}, line {number} is damaged: take the line out, and its run is done again"
            ) from None
        found.append(record)
    return found


def add(record: Record, folder: Path = FOLDER) -> None:
    """Adds a record to its job's file, which is written whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*read(record["job"], folder), record]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic.write_text(folder / f"{record['job']}.jsonl", text)


def with_digest(records: Iterable[Record], wanted: str, method: str) -> Record | None:
    """The record of a run that was done, under the method's name where it is there under several:
    an option may change nothing of a job, as moments do where SGD trains.
    """
    found = [record for record in records if record["digest"] == wanted]
    own = [record for record in found if record["method"] == method]
    return next(iter(own + found), None)


@functools.cache
def stamp() -> Record:
    """What produces the records now: commit (`+` with changes that are in none), versions, CPU."""
    root = Path(__file__).parent.parent.parent

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        return done.stdout.strip()

    changed = "+" if git("status", "--porcelain", "-uno", "rolora", "rolora_kernels") else ""
    return {
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + changed,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "machine": cpu(),
        "date": date.today().isoformat(),
    }


def final(record: Record) -> float:
    """The headline at the end; the worst there is for a run that diverged."""
    if record["diverged"]:
        return metrics.worst(record["headline"])
    return float(record["curve"][-1][3])
