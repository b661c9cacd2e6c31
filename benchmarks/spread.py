"""Why RoLoRA's spread over seeds grows at 50 clients: the two-layer network on digits, where rounds
times clients is constant, as in the recipes for GLUE (RTE: 200 rounds x 3 clients, 12 x 50).

    python -m benchmarks.spread             # writes results/spread.json
    python -m benchmarks.spread rates       # one of the studies, by the beginning of its name
    python -m benchmarks.spread --smoke     # two rounds of each, written nowhere
    python -m benchmarks.spread table

Even split, 20 local steps of 16 examples a round, SGD, rank 4, the paper's algorithm unless said
otherwise; the head is random and frozen, as in the paper's code. A run is judged on the held-out
slice (seeds TUNING, which choose rates) or on the test set (SEEDS). Every run keeps its whole curve
and the norms of A, B and BA. Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suite import records
from rolora.experiments import digits, two_layers
from rolora.recipes import Batch

RESULTS = Path(__file__).parent / "results" / "spread.json"
ROUNDS = {3: 200, 50: 12}  # by clients
PLAIN = "rolora+local-coordinates=false+control-variates=false"  # the paper's algorithm
_LOCAL = "rolora+local-coordinates"
QUARTER = "rolora, B at a quarter of A's rate"
# What a contender's text stands for: a variant, and B's rate by A's. Others are variants.
CONTENDERS = {
    "rolora": (PLAIN, 1.0),
    QUARTER: (PLAIN, 0.25),
    _LOCAL: (f"{_LOCAL}+control-variates=false", 1.0),
}
RATES = (0.3, 1.0, 2.0, 4.0, 8.0)
SEEDS, TUNING = tuple(range(8)), (1000, 1001)
TUNED = ("rolora", "fedavg", QUARTER, _LOCAL)  # local alternation ran too, lost and is gone
SLOW = 0.1
_POINTS = 12  # of a curve
_BATCH, _KEPT = 16, 4  # singular values of BA
_FIXED = 7  # what a source of chance is drawn with that does not vary


@dataclass(frozen=True)
class Run:
    """What identifies a run. varies: which draws its seed decides, all others stay."""

    method: str
    clients: int
    rounds: int
    rate: float
    seed: int
    varies: str = "all"  # all; A and B; head; batches
    steps: int = 20  # local, in a round
    rank: int = 4


class Rows(two_layers.DigitsRecipe):
    """Examples are row numbers, so that a batch is one look-up. The held-out slice and the test set
    are evaluated together: `held` and `accuracy`.
    """

    def __init__(self, data: digits.Digits):
        parts = (data.train, data.held, data.test)
        self.images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in parts]))
        self.cuts = np.cumsum([len(labels) for _, labels in parts])

    def collate(self, examples: Sequence) -> Batch:
        rows = torch.as_tensor(np.fromiter(examples, dtype=np.int64))
        size = len(rows)
        return Batch({"images": self.images[rows]}, self.labels[rows], size, size, size)

    def evaluate(self, model, examples: Sequence, batch_size: int) -> dict[str, float]:
        held = super().evaluate(model, range(self.cuts[0], self.cuts[1]), batch_size)
        test = super().evaluate(model, range(self.cuts[1], self.cuts[2]), batch_size)
        return test | {"held": held["accuracy"]}


def prepared(run: Run, data: digits.Digits) -> Any:
    """A run's job (`rolora.run.job.Job`)."""
    seeds = {
        name: run.seed if run.varies in ("all", name) else _FIXED
        for name in ("A and B", "head", "batches")
    }
    variant, times = CONTENDERS.get(run.method, (run.method, 1.0))
    setting = two_layers.Setting(
        variant, "iid", run.rate, seeds["A and B"], run.rounds, run.rank, "digits"
    )
    job = two_layers.prepare(setting, data, "test")
    head = dict(job.model.named_parameters())["out.weight"]
    draw = torch.Generator().manual_seed(10_000 + seeds["head"])
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=draw) / head.shape[1] ** 0.5)
    job.recipe, rows = Rows(data), len(data.train[1])
    job.train, job.evaluation = range(rows), range(rows, job.recipe.cuts[2])
    order = np.random.default_rng(seeds["batches"]).permutation(rows)
    job.clients = [np.sort(order[client :: run.clients]) for client in range(run.clients)]
    job.config = job.config.with_values(
        seed=seeds["batches"],
        clients=run.clients,
        clients_per_round=run.clients,
        local_epochs=None,
        local_steps=run.steps,
        batch_size=_BATCH,
        eval_every=max(1, run.rounds // _POINTS),
        lr_b=run.rate * times,
    )
    return job


def measured(run: Run, data: digits.Digits) -> dict[str, Any]:
    """A run's curve of test accuracy from before training on, its norms of A, B and BA at the same
    rounds, and its accuracy on the held-out slice at the end.
    """
    from rolora.federated.server import QuorumMissed
    from rolora.run.federation import build_server

    curve: list[float] = []
    norms: list[list[float]] = []
    held = 0.0

    def on_round(row: dict[str, Any]) -> None:
        nonlocal held
        if not row["eval"]:
            return
        held = row["eval"]["held"]
        curve.append(round(row["eval"]["accuracy"], 4))
        A, B = server.state.published["A"], server.state.published["B"]
        A, B = A.view(run.rank, -1), B.view(-1, run.rank)
        sizes = [A.norm(), B.norm(), *torch.linalg.svdvals(B @ A)[:_KEPT], dead(A, B)]
        norms.append([float(f"{float(size):.3g}") for size in sizes])

    job = prepared(run, data)
    images = job.recipe.images[: job.recipe.cuts[0]]

    def dead(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return (images @ A.T @ B.T).gt(0).any(0).logical_not().float().mean()

    server = build_server(job, on_round=on_round)
    server.norms.multiple = 0.0  # as in the toy experiment: rates are high
    try:
        server.run()
    except QuorumMissed:  # every client diverged: it stays where it was
        pass
    return {"curve": curve, "held": round(held, 4), "norms": norms}


class Found:
    """The runs of the file, each made once."""

    def __init__(self, path: Path | None, rounds: int | None = None):
        self.path, self.rounds = path, rounds
        self.data = digits.load(None)
        self.stamps: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.stamps, self.runs = stored["stamps"], stored["runs"]

    def run(self, run: Run) -> dict[str, Any]:
        if self.rounds is not None:
            run = replace(run, rounds=self.rounds)
        key = asdict(run)
        for known in self.runs:
            if key.items() <= known.items():
                return known
        if records.stamp() not in self.stamps:
            self.stamps.append(records.stamp())
        stamp = self.stamps.index(records.stamp())
        self.runs.append(key | measured(run, self.data) | {"stamp": stamp})
        print(key, self.runs[-1]["curve"][-1], flush=True)
        if self.path is not None:
            lines = ",\n".join(json.dumps(run) for run in self.runs)
            stamps = json.dumps(self.stamps)
            text = f'{{"stamps": {stamps}, "runs": [\n{lines}\n]}}\n'
            self.path.write_text(text, encoding="utf-8")
        return self.runs[-1]

    def best(self, method: str, rank: int = 4) -> Run:
        """A method at 50 clients with that of RATES which is best on the held-out slice."""
        first = Run(method, 50, ROUNDS[50], 0.0, 0, rank=rank)
        scores = {}
        for rate in RATES:
            tried = [self.run(replace(first, rate=rate, seed=seed)) for seed in TUNING]
            scores[rate] = statistics.mean(run["held"] for run in tried)
        return replace(first, rate=max(scores, key=lambda rate: scores[rate]))


def studies(found: Found) -> dict[str, Callable[[], Iterator[Run]]]:
    """The cells of every study, each a run without its seed. Chooses rates where it has to."""

    def slow() -> Iterator[Run]:
        """A rate that is small for so few rounds, and what may count there."""
        first = Run("rolora", 50, ROUNDS[50], SLOW, 0)
        yield from (first, replace(first, rate=2 * SLOW), replace(first, method="fedavg"))
        yield from (replace(first, varies=name) for name in ("A and B", "head", "batches"))
        yield from (replace(first, rank=16), replace(first, clients=3))
        yield replace(first, clients=3, rounds=ROUNDS[3])

    def rates() -> Iterator[Run]:
        yield from (found.best(method) for method in TUNED)
        yield found.best("rolora", rank=8)

    def rounds() -> Iterator[Run]:
        """As many local steps, in more and shorter rounds."""
        for steps in (10, 4):
            longer = ROUNDS[50] * 20 // steps
            yield replace(found.best("rolora"), rounds=longer, steps=steps)

    return {"slow": slow, "rates": rates, "rounds": rounds}


def table() -> None:
    """A line for every cell. What it reached is compared, seed by seed, with FedAvg at as many
    clients and local steps, at its small rate or at its best: the difference, its standard error,
    and the correlation over seeds.
    """
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    cells: dict[Run, dict[int, dict[str, Any]]] = {}
    for run in runs:
        cell = Run(**{name: run[name] for name in asdict(Run("", 0, 0, 0.0, 0))})
        if run["seed"] in SEEDS:
            cells.setdefault(replace(cell, seed=0), {})[run["seed"]] = run
    rival = {
        (cell.clients, cell.rounds * cell.steps, cell.rate <= 2 * SLOW): found
        for cell, found in cells.items()
        if cell.method == "fedavg"
    }
    print(
        "| method | clients | rounds x steps | rank | rate | chance in | accuracy | "
        "lowest, highest | less FedAvg by seed, r | units that are off | runs |\n"
        + "|---" * 11
        + "|"
    )
    for cell, found in cells.items():
        ends = [run["curve"][-1] for run in found.values()]
        if len(ends) < 2:
            continue
        key = (cell.clients, cell.rounds * cell.steps, cell.rate <= 2 * SLOW)
        beside = rival.get(key, {}) if cell.method != "fedavg" and cell.varies == "all" else {}
        pairs = [
            (run["curve"][-1], beside[seed]["curve"][-1])
            for seed, run in found.items()
            if seed in beside
        ]
        less = ""
        if len(pairs) > 1:
            differences = [own - other for own, other in pairs]
            error = statistics.stdev(differences) / len(pairs) ** 0.5
            r = statistics.correlation(*zip(*pairs, strict=True))
            less = f"{statistics.mean(differences):+.3f} ± {error:.3f}, {r:+.2f}"
        off = statistics.mean(run["norms"][-1][-1] for run in found.values())
        print(
            f"| {cell.method} | {cell.clients} | {cell.rounds} x {cell.steps} | {cell.rank} | "
            f"{cell.rate:g} | {cell.varies} | {statistics.mean(ends):.3f} ± "
            f"{statistics.stdev(ends):.3f} | {min(ends):.3f}, {max(ends):.3f} | {less} | "
            f"{100 * off:.1f} % | {len(ends)} |"
        )


def measure(asked: str, smoke: bool) -> None:
    torch.set_num_threads(1)
    found = Found(None, 2) if smoke else Found(RESULTS)
    if not any(name.startswith(asked) for name in studies(found)):
        sys.exit(f"{asked!r} begins no study's name: {', '.join(studies(found))}")
    for name, runs in studies(found).items():
        if name.startswith(asked):
            for run in runs():
                for seed in SEEDS[: 2 if smoke else None]:
                    found.run(replace(run, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("study", nargs="?", default="", help="the beginning of a study's name")
    parser.add_argument("--smoke", action="store_true", help="two rounds, written nowhere")
    asked = parser.parse_args()
    if asked.study == "table":
        return table()
    measure(asked.study, asked.smoke)


if __name__ == "__main__":
    main()
