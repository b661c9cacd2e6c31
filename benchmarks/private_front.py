"""Accuracy under client-level differential privacy against megabytes up, ε by ε.

    python -m benchmarks.private_front                         # writes results/private_front.json
    python -m benchmarks.private_front --epsilons 1,none --methods rolora,la-lora --minutes 10
    python -m benchmarks.private_front --list                  # how many runs are left
    python -m benchmarks.private_front --tables

The two-layer network on digits (`rolora.experiments.two_layers`), 575 clients with two examples
each, of which every one takes part in a round by itself with probability 60 / 575; SGD, four local
steps. A method has the same twelve tries at an ε, pairs of a rate and a clip (`none`: six rates,
nothing is clipped), each one run on the held-out slice with a seed that no result uses; the best
mean of the last rounds is taken. Results are the last published factors on the test set. Noise and
draws come from the operating system (as in every private run), so only start, split and messages
follow the seed. The rounds are those of `benchmarks.private_rounds`. Runs in the file are not
repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.private_rounds import A_ROUND, Run, measured
from benchmarks.suite import records
from rolora import atomic
from rolora.errors import BadInput

RESULTS = Path(__file__).parent / "results" / "private_front.json"
EPSILONS: tuple[float | None, ...] = (1.0, 8.0, 3.0, None)
TRIES = tuple((rate, clip) for clip in (0.5, 1.0, 2.0) for rate in (0.3, 1.0, 3.0, 10.0))
RATES = tuple((rate, None) for rate in (0.3, 0.5, 1.0, 3.0, 5.0, 10.0))
# A method, `*2` at twice the rank, and the precision of its messages.
METHODS = (
    "la-lora",
    "fedavg",
    "rolora+balance",
    "rolora",
    "rolora+local-coordinates=false",
    "ffa",
    "rolora+balance*2",
    "la-lora+local-steps=8",
    "fedavg*2",
    "fedrot",
    "rolora+balance+schedule=BBA",
    "rolora+balance+server-momentum=0.5+server-dampening=0.5",
)
WIRES = dict.fromkeys(("rolora+balance", "fedavg", "la-lora"), ("bf16", "int8"))
AGAINST = "la-lora"  # what differences are from
SEEDS, TUNING_SEED = tuple(range(10)), 1000


class OutOfTime(Exception):
    """No run may be begun any more."""


_IDENTITY = tuple(field.name for field in dataclasses.fields(Run))


class Found:
    """The runs of the file, each made once; `stamp` of a run is the place of what made it."""

    def __init__(self, path: Path | None, deadline: float | None = None):
        self.path, self.deadline = path, deadline
        self.runs: dict[Run, dict[str, Any]] = {}
        self.stamps: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.stamps = stored["stamps"]
            for row in stored["runs"]:
                run = dict(zip(stored["columns"], row, strict=True))
                self.runs[Run(*(run[name] for name in _IDENTITY))] = run

    def run(self, run: Run) -> dict[str, Any]:
        """The record of a run, done now where it is not there."""
        if run in self.runs:
            return self.runs[run]
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime
        stamp = records.stamp()
        if stamp not in self.stamps:
            self.stamps.append(stamp)
        made = self.runs[run] = measured(run) | {"stamp": self.stamps.index(stamp)}
        print(*made.values(), flush=True)
        if self.path is not None:
            rows = ",\n".join(json.dumps(list(record.values())) for record in self.runs.values())
            head = json.dumps({"stamps": self.stamps, "columns": list(made)})
            atomic.write_text(self.path, f'{head[:-1]}, "runs": [\n{rows}\n]}}\n')
        return made

    def chosen(self, method: str, epsilon: float | None) -> tuple[float, float | None] | None:
        """The try that was best, None where one is missing."""
        scores = {}
        for pair in tries(epsilon):
            found = self.runs.get(Run(method, "bf16", epsilon, *pair, TUNING_SEED, "validation"))
            if found is None:
                return None
            scores[pair] = found["accuracy"]
        return max(scores, key=lambda pair: scores[pair])


def tries(epsilon: float | None) -> tuple[tuple[float, float | None], ...]:
    """The pairs of a rate and a clip that every method may choose from."""
    return RATES if epsilon is None else TRIES


def planned(
    found: Found, methods: Sequence[str], epsilons: Sequence[float | None]
) -> Iterator[Run]:
    """The runs of a study, a method's tries before its results."""
    for epsilon in epsilons:
        for method in methods:
            for pair in tries(epsilon):
                yield Run(method, "bf16", epsilon, *pair, TUNING_SEED, "validation")
            pair = found.chosen(method, epsilon) or tries(epsilon)[0]
            for wire in WIRES.get(method, ("bf16",)):
                for seed in SEEDS:
                    yield Run(method, wire, epsilon, *pair, seed, "test")


def results(found: Found, method: str, wire: str, epsilon: float | None) -> dict[int, dict]:
    """The results of a method at its chosen try, by seed; empty unless all are there."""
    pair = found.chosen(method, epsilon)
    if pair is None:
        return {}
    runs = [found.runs.get(Run(method, wire, epsilon, *pair, s, "test")) for s in SEEDS]
    return {run["seed"]: run for run in runs if run} if all(runs) else {}


def _rows() -> Iterator[tuple[Found, str, str]]:
    found = Found(RESULTS)
    for method in METHODS:
        for wire in WIRES.get(method, ("bf16",)):
            yield found, method, wire


def _with_error(values: Sequence[float], sign: str = "") -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):{sign}.3f} ± {error:.3f}"


def front() -> None:
    """One line for each method and wire: what it reaches at each ε, beside what it sends."""
    shown = sorted(EPSILONS, key=lambda e: e or math.inf)
    names = " | ".join("ε = ∞" if e is None else f"ε = {e:g}" for e in shown)
    print(f"| method | wire | values a round | MB up | {names} |\n" + "|---" * 8 + "|")
    for found, method, wire in _rows():
        cells, any_run = [], None
        for epsilon in shown:
            runs = results(found, method, wire, epsilon)
            cells.append(_with_error([r["accuracy"] for r in runs.values()]) if runs else "–")
            any_run = next(iter(runs.values()), any_run)
        if any_run:
            sent = f"{any_run['values']:,} | {any_run['MB_up']:.2f}"
            print(f"| {method} | {wire} | {sent} | {' | '.join(cells)} |")


def differences() -> None:
    """One line for each method and ε: its difference from LA-LoRA's rule, paired by seed, with the
    try that was chosen, and the most that a change can be beside the norm of a round's noise.
    """
    print(
        "| ε | method | rate, clip | noise multiplier | clip / norm of the mean's noise | against "
        f"{AGAINST} |\n" + "|---" * 6 + "|"
    )
    for epsilon in sorted(EPSILONS, key=lambda e: e or math.inf):
        for found, method, wire in _rows():
            own = results(found, method, wire, epsilon)
            other = results(found, AGAINST, "bf16", epsilon)
            if not own or not other or method == AGAINST or wire != "bf16":
                continue
            run = own[SEEDS[0]]
            z, ratio = "–", "–"
            if run["noise"]:  # its deviation z C in each value
                z = f"{run['noise']:.2f}"
                # of the sum, z C √d; of the mean, over the planned cohort
                ratio = f"{A_ROUND / (run['noise'] * math.sqrt(run['values'])):.2f}"
            paired = [own[s]["accuracy"] - other[s]["accuracy"] for s in SEEDS]
            name = "∞" if epsilon is None else f"{epsilon:g}"
            clip = "none" if run["clip"] is None else f"{run['clip']:g}"
            print(
                f"| {name} | {method} | {run['rate']:g}, {clip} | {z} | {ratio} | "
                f"{_with_error(paired, '+')} |"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epsilons", help="separated by commas; none: not private")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--minutes", type=float, help="after which no run is begun")
    parser.add_argument("--list", action="store_true", help="say how many runs are left")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    given = parser.parse_args(arguments)
    if given.tables:
        front()
        return differences()
    epsilons = EPSILONS
    if given.epsilons:
        names = given.epsilons.split(",")
        epsilons = tuple(None if name == "none" else float(name) for name in names)
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    torch.set_num_threads(1)
    found, methods = Found(RESULTS, deadline), given.methods.split(",")
    if given.list:
        left = [run for run in planned(found, methods, epsilons) if run not in found.runs]
        return print(f"{len(left)} runs are left")
    try:
        for run in planned(found, methods, epsilons):
            found.run(run)
    except OutOfTime:
        print("out of time: the same command goes on from here")
    except BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
