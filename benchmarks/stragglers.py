"""Accuracy against simulated time where one client of ten is ten times slower: rounds that wait for
everybody, and rounds that end after K answers (`--buffer K`).

    python -m benchmarks.stragglers             # writes results/stragglers.json
    python -m benchmarks.stragglers digits      # one of the two jobs
    python -m benchmarks.stragglers --smoke     # a few rounds, written nowhere
    python -m benchmarks.stragglers table

Two jobs: the two-layer network on digits (30 clients with skewed labels, 10 of them in training at
any time, 5 local steps) and the built-in model on the built-in text (20 clients, 10 in training).
On the digits every way to run has a rate of its own, the best of a grid on held-out examples with a
seed that the results do not use; the built-in job has its preset's. All that is timed is simulated,
so the machine does not matter. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "stragglers.json"
# The method and how its rounds end.
WAYS: dict[str, dict[str, Any]] = {
    "rolora": {},
    "rolora, K = 5": {"buffer": 5},
    "rolora, K = 2": {"buffer": 2},
    "rolora, K = 5, age not weighed": {"buffer": 5, "staleness_exponent": 0.0},
    "fedavg": {},
    "fedavg, K = 5": {"buffer": 5},
    "ffa": {},
    "ffa, K = 5": {"buffer": 5},
}
SHOWN = {"digits": tuple(WAYS), "built-in": tuple(WAYS)[:2]}
RATES = (0.5, 1.0, 2.0, 4.0)
SEEDS, TUNING_SEED = {"digits": (0, 1, 2), "built-in": (0, 1)}, 1000
UNTIL = {"digits": 480.0, "built-in": 120.0}  # simulated seconds
_POINTS = 16  # of a curve


class Over(Exception):
    """The simulated time is over."""


def rows_of(job: Any, until: float) -> list[dict[str, Any]]:
    """The rounds of a job up to a simulated time."""
    from rolora.run.federation import build_server

    rows: list[dict[str, Any]] = []

    def on_round(row: dict[str, Any]) -> None:
        if row.get("simulated_seconds", 0.0) > until:
            raise Over
        rows.append(row)

    server = build_server(job, on_round=on_round)
    server.norms.multiple = 0.0  # as in the toy experiment: rates are high
    try:
        server.run()
    except Over:
        pass
    return rows


def digits_job(way: str, rate: float, seed: int, on: str) -> Any:
    """30 clients, labels by Dirichlet(0.5), three of them ten times slower."""
    from rolora.experiments import digits, two_layers
    from rolora.federated import partition

    images = digits.load(None)
    method = way.partition(",")[0]
    setting = two_layers.Setting(method, "iid", rate, seed, 10**6, 8, "digits")
    job = two_layers.prepare(setting, images, on)
    labels = [int(label) for label in images.train[1]]
    job.clients = partition.dirichlet(labels, 30, 0.5, seed)
    options: dict[str, Any] = dict(clients=30, clients_per_round=10, engine="sequential")
    options |= dict(local_epochs=None, local_steps=5, client_speeds="tail", staleness_exponent=0.5)
    options |= dict(control_variates=False)  # a third of the clients take part
    job.config = job.config.with_values(**(options | WAYS[way]))
    return job


def built_in_job(way: str, rate: float, seed: int, on: str) -> Any:
    """The built-in job with 20 clients, two of them ten times slower."""
    from rolora import config
    from rolora.run.job import prepare

    options: dict[str, Any] = dict(clients=20, clients_per_round=10, engine="sequential")
    options |= dict(client_speeds="tail", seed=seed, rounds=10**6, device="cpu")
    options |= dict(eval_max_examples=200, exchange_dtype="bf16", equal_factors=False)
    options |= dict(method=way.partition(",")[0], eval_every=4 if WAYS[way] else 1)
    return prepare(config.resolve(options | WAYS[way], preset="builtin"))


JOBS: dict[str, Callable[[str, float, int, str], Any]] = {
    "digits": digits_job,
    "built-in": built_in_job,
}


def measured(job: str, way: str, rate: float, seed: int, on: str, until: float) -> dict[str, Any]:
    """One run: its accuracy at `_POINTS` times, and what was counted."""
    rows = rows_of(JOBS[job](way, rate, seed, on), until)
    curve, last = [], 0.0
    for point in range(1, _POINTS + 1):
        for row in rows:
            if row.get("simulated_seconds", 0.0) <= until * point / _POINTS and row["eval"]:
                last = row["eval"]["accuracy"]
        curve.append(round(last, 4))
    ages = [row["staleness"][1] for row in rows[1:] if row.get("staleness")]
    return {
        "job": job,
        "way": way,
        "rate": rate,
        "seed": seed,
        "on": on,
        "until": until,
        "rounds": len(rows) - 1,
        "answers": sum(row["clients"] for row in rows),
        "median_age": round(statistics.mean(ages), 2) if ages else 0.0,
        "oldest": max((row["staleness"][2] for row in rows[1:] if row.get("staleness")), default=0),
        "MB_up": round(sum(row["bytes_up"] for row in rows) / 1e6, 3),
        "curve": curve,
    }


class Found:
    """The runs of the file, each made once."""

    def __init__(self, path: Path | None):
        self.path = path
        self.runs: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            self.runs = json.loads(path.read_text(encoding="utf-8"))["runs"]

    def run(self, *key: Any) -> dict[str, Any]:
        for run in self.runs:
            if tuple(run[k] for k in ("job", "way", "rate", "seed", "on", "until")) == key:
                return run
        self.runs.append(measured(*key))
        print({k: v for k, v in self.runs[-1].items() if k != "curve"}, self.runs[-1]["curve"])
        if self.path is not None:
            lines = ",\n".join(json.dumps(run) for run in self.runs)
            head = json.dumps({"date": date.today().isoformat(), "torch": torch.__version__})
            self.path.write_text(f'{head[:-1]}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        return self.runs[-1]


def measure(jobs: list[str], smoke: bool) -> None:
    torch.set_num_threads(1)
    found = Found(None if smoke else RESULTS)
    for job in jobs:
        until = UNTIL[job] / 16 if smoke else UNTIL[job]
        for way in SHOWN[job]:
            rate = 0.0  # its preset's
            if job == "digits":
                tried = {r: found.run(job, way, r, TUNING_SEED, "held", until / 2) for r in RATES}
                rate = max(tried, key=lambda r: statistics.mean(tried[r]["curve"][-4:]))
            for seed in SEEDS[job][:1] if smoke else SEEDS[job]:
                found.run(job, way, rate, seed, "test", until)


def table() -> None:
    """One line for each way: accuracy at an eighth, a quarter, half and all of the time. A rate
    with a star is at the edge of the grid.
    """
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    print(
        "| job | way | rate | accuracy after 1/8 | 1/4 | 1/2 | all of the time | simulated seconds "
        "to the end of the run that waits | rounds | answers | median age |\n" + "|---" * 11 + "|"
    )
    for job, ways in SHOWN.items():
        for way in ways:
            runs = [r for r in results if (r["job"], r["way"], r["on"]) == (job, way, "test")]
            if not runs:
                continue
            target = _end(results, job, way.partition(",")[0])
            shown = " | ".join(
                f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}"
                for c in ([r["curve"][n - 1] for r in runs] for n in (2, 4, 8, 16))
            )
            rate = f"{runs[0]['rate']:g}{'*' * (runs[0]['rate'] in (RATES[0], RATES[-1]))}"
            if job == "built-in":
                rate = "preset's"
            print(
                f"| {job} | {way} | {rate} | {shown} | {_reached(runs, target)} | "
                f"{_mean(runs, 'rounds'):,.0f} | {_mean(runs, 'answers'):,.0f} | "
                f"{_mean(runs, 'median_age'):.1f} |"
            )


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def _end(results: list[dict[str, Any]], job: str, method: str) -> float:
    """The accuracy that the method reaches by rounds that wait."""
    key = (job, method, "test")
    return statistics.mean(
        run["curve"][-1] for run in results if (run["job"], run["way"], run["on"]) == key
    )


def _reached(runs: list[dict[str, Any]], target: float) -> str:
    """When the mean curve is first there, to a sixteenth of the time."""
    for point in range(_POINTS):
        if statistics.mean(run["curve"][point] for run in runs) >= target:
            return f"{runs[0]['until'] * (point + 1) / _POINTS:,.0f}"
    return "–"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--smoke"]
    if words == ["table"]:
        return table()
    if not set(words) <= set(JOBS):
        sys.exit(__doc__)
    measure(words or list(JOBS), "--smoke" in sys.argv)


if __name__ == "__main__":
    main()
