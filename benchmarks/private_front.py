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
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.private_rounds import A_ROUND, CLIENTS, RANK, ROUNDS, Run, measured, noise
from benchmarks.suite import records
from rolora import atomic

RESULTS = Path(__file__).parent / "results" / "private_front.json"
EPSILONS: tuple[float | None, ...] = (1.0, 8.0, 3.0, None)
BASES = ("none", "mirrored")
CLIPS = {1.0: (0.5, 1.0, 2.0), 3.0: (0.7, 1.4, 2.8), 8.0: (1.0, 2.0, 4.0)}
RATES, RATES_ALONE = (0.3, 1.0, 3.0, 10.0), (0.3, 0.5, 1.0, 3.0, 5.0, 10.0)
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
)
# What ran, and lost: --server-dampening is gone. Tables show it.
SHOWN = (*METHODS, "rolora+balance+server-momentum=0.5+server-dampening=0.5")
IN_INT8 = ("la-lora", "fedavg", "rolora+balance")  # too, without a base
AGAINST = ("la-lora", "fedavg")  # what differences are from
SEEDS, TUNING_SEED = tuple(range(10)), 1000


Pair = tuple[float, float | None]  # a rate, and a clip where there is one


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

    def chosen(self, base: str, method: str, epsilon: float | None) -> Pair | None:
        """The try that was best, None where one is missing."""
        scores = {}
        for pair in tries(epsilon):
            run = Run(method, "bf16", epsilon, *pair, TUNING_SEED, "validation", base=base)
            found = self.runs.get(run)
            if found is None:
                return None
            scores[pair] = found["accuracy"]
        return max(scores, key=lambda pair: scores[pair])


def tries(epsilon: float | None) -> tuple[Pair, ...]:
    """The pairs of a rate and a clip that every method may choose from."""
    if epsilon is None:
        return tuple((rate, None) for rate in RATES_ALONE)
    return tuple((rate, clip) for clip in CLIPS[epsilon] for rate in RATES)


def wires(base: str, method: str) -> tuple[str, ...]:
    """The precisions in which a method has results; it is tuned in bf16."""
    return ("bf16", "int8") if base == "none" and method in IN_INT8 else ("bf16",)


def planned(
    found: Found, bases: Sequence[str], methods: Sequence[str], epsilons: Sequence[float | None]
) -> Iterator[Run]:
    """The runs of a study, a method's tries before its results."""
    for base, epsilon, method in itertools.product(bases, epsilons, methods):
        for pair in tries(epsilon):
            yield Run(method, "bf16", epsilon, *pair, TUNING_SEED, "validation", base=base)
        pair = found.chosen(base, method, epsilon) or tries(epsilon)[0]
        for wire in wires(base, method):
            for seed in SEEDS:
                yield Run(method, wire, epsilon, *pair, seed, "test", base=base)


def results(
    found: Found, base: str, method: str, wire: str, epsilon: float | None
) -> dict[int, dict[str, Any]]:
    """The results of a method at its chosen try, by seed; empty unless all are there."""
    pair = found.chosen(base, method, epsilon)
    if pair is None:
        return {}
    wanted = {seed: Run(method, wire, epsilon, *pair, seed, "test", base=base) for seed in SEEDS}
    runs = {seed: found.runs[run] for seed, run in wanted.items() if run in found.runs}
    return runs if len(runs) == len(SEEDS) else {}


def _rows() -> Iterator[tuple[str, str, str]]:
    for base, method in itertools.product(BASES, SHOWN):
        for wire in wires(base, method):
            yield base, method, wire


def _paired(found: Found, base: str, method: str, wire: str, epsilon: float | None) -> list[str]:
    """The differences from `AGAINST`, seed by seed."""
    own, cells = results(found, base, method, wire, epsilon), []
    for other in AGAINST:
        theirs = results(found, base, other, "bf16", epsilon)
        cells.append("–")
        if own and theirs and (method, wire) != (other, "bf16"):
            pairs = [own[seed]["accuracy"] - theirs[seed]["accuracy"] for seed in SEEDS]
            cells[-1] = _with_error(pairs, "+")
    return cells


def _name(epsilon: float | None) -> str:
    return "∞" if epsilon is None else f"{epsilon:g}"


def _with_error(values: Sequence[float], sign: str = "") -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):{sign}.3f} ± {error:.3f}"


def front() -> None:
    """One line for each base, method and wire: what it reaches at each ε, beside what it sends."""
    found, shown = Found(RESULTS), sorted(EPSILONS, key=lambda e: e or math.inf)
    names = " | ".join(f"ε = {_name(epsilon)}" for epsilon in shown)
    print(f"| base | method | wire | values a round | MB up | {names} |\n" + "|---" * 9 + "|")
    for base, method, wire in _rows():
        all_runs = [results(found, base, method, wire, epsilon) for epsilon in shown]
        if any(all_runs):
            cells = [
                _with_error([r["accuracy"] for r in runs.values()]) if runs else "–"
                for runs in all_runs
            ]
            one = next(runs for runs in all_runs if runs)[SEEDS[0]]
            sent = f"{one['values']:,} | {one['MB_up']:.1f}"
            print(f"| {base} | {method} | {wire} | {sent} | {' | '.join(cells)} |")


def differences() -> None:
    """One line for each method, base and ε: its differences from LA-LoRA's rule and from FedAvg,
    with the try that was chosen (`*`: at the edge of the grid), and the most that a change can be
    beside the norm of the noise of a round.
    """
    print(
        "| base | ε | method | rate, clip | noise multiplier | clip / norm of the mean's noise | "
        f"{' | '.join(f'against {other}' for other in AGAINST)} |\n" + "|---" * 8 + "|"
    )
    found = Found(RESULTS)
    for base, epsilon in itertools.product(BASES, sorted(EPSILONS, key=lambda e: e or math.inf)):
        for method in SHOWN:
            runs = results(found, base, method, "bf16", epsilon)
            if not runs:
                continue
            run, z, ratio = runs[SEEDS[0]], "–", "–"
            if run["noise"]:
                z = f"{run['noise']:.2f}"
                # of the sum z C √d, of the mean that over the planned cohort
                ratio = f"{A_ROUND / (run['noise'] * math.sqrt(run['values'])):.2f}"
            pair = ", ".join(
                "none" if value is None else f"{value:g}{'*' * (value in (min(grid), max(grid)))}"
                for value, grid in zip(
                    (run["rate"], run["clip"]), zip(*tries(epsilon), strict=True), strict=True
                )
            )
            cells = " | ".join(_paired(found, base, method, "bf16", epsilon))
            print(f"| {base} | {_name(epsilon)} | {method} | {pair} | {z} | {ratio} | {cells} |")


def product_noise(
    deviation: float, rank: int, out: int, width: int, norm_A: float, norm_B: float, sent: str
) -> float:
    """The expected square of the Frobenius norm of what a round's noise adds to B A, with B
    `[out, rank]` and A `[rank, width]` of those Frobenius norms: B's noise alone gives N A, A's
    alone B N, and both also their product, which no norm makes smaller.
    """
    from_B = deviation**2 * out * norm_A**2
    from_A = deviation**2 * width * norm_B**2
    both = from_B + from_A + deviation**4 * rank * out * width
    return {"B": from_B, "A": from_A, "BOTH": both}[sent]


def figures() -> dict[str, str]:
    """What sentences say of the results: every method's accuracy at every ε, differences, and the
    noise of a round at ε = 1 and a clip of 1, with factors of orthonormal rows and columns.
    """
    found, said = Found(RESULTS), {}
    for (base, method, wire), epsilon in itertools.product(_rows(), EPSILONS):
        own = results(found, base, method, wire, epsilon)
        if own:
            name = f"private {base} {method} {wire} {_name(epsilon)}"
            mean = statistics.mean(run["accuracy"] for run in own.values())
            said[name] = f"{mean:.3f}".removeprefix("0")
            for other, text in zip(
                AGAINST, _paired(found, base, method, wire, epsilon), strict=True
            ):
                said[f"{name} - {other}"] = text
    deviation = noise(1.0, ROUNDS, CLIENTS["none"]) / A_ROUND
    one, both = (
        product_noise(deviation, RANK, 64, 64, math.sqrt(RANK), math.sqrt(RANK), sent)
        for sent in ("B", "BOTH")
    )
    said["private deviation"] = f"{deviation:.3f}".removeprefix("0")
    said["private noise of one"] = f"{math.sqrt(one):.2f}"
    said["private noise of both"] = f"{math.sqrt(both):.2f}"
    said["private quadratic share"] = f"{100 * (both - 2 * one) / both:.0f} %"
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epsilons", help="separated by commas; none: not private")
    parser.add_argument("--bases", default=",".join(BASES), help="separated by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--minutes", type=float, help="after which no run is begun")
    parser.add_argument("--list", action="store_true", help="say how many runs are left")
    parser.add_argument("--tables", action="store_true", help="print the tables")
    given = parser.parse_args(arguments)
    if given.tables:
        front()
        return differences()
    named = {"none" if epsilon is None else f"{epsilon:g}": epsilon for epsilon in EPSILONS}
    known = {"epsilons": named, "bases": BASES, "methods": METHODS}
    asked = {flag: (getattr(given, flag) or ",".join(known[flag])).split(",") for flag in known}
    for flag, values in asked.items():
        if unknown := [value for value in values if value not in known[flag]]:
            parser.error(f"--{flag} {unknown[0]!r} is not one of {', '.join(known[flag])}")
    deadline = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    torch.set_num_threads(1)
    found = Found(RESULTS, deadline)
    epsilons = [named[name] for name in asked["epsilons"]]
    runs = planned(found, asked["bases"], asked["methods"], epsilons)
    if given.list:
        return print(f"{sum(run not in found.runs for run in runs)} runs are left")
    try:
        for run in runs:
            found.run(run)
    except OutOfTime:
        print("out of time: the same command goes on from here")


if __name__ == "__main__":
    main()
