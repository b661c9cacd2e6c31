"""`python -m rolora.experiments.toy`: the paper's two-layer network on digits that are split by
label, any method.

    f(x) = ReLU(x A B) W_out,  A [d, r] and B [r, h] train, W_out [h, 10] is fixed and random
    (section 5.1, Figure 2)

Here A and B are the factors of an adapter on a linear layer of zeros, and the rounds are the
engine's own: what is compared is what a run of `rolora.train` does. Clients see two labels each (5
clients), one (10 clients), or all (10 clients, iid). B starts at 1e-2 · Gaussian: at exactly 0 the
derivative of ReLU(0) is 0 and nothing would ever train. Gradients are clipped, because plain SGD
diverges at the larger rates. Each method's rate is the best on a held-out slice of the training
data over seeds that the results do not use. The digits are UCI's (DIGITS.md); `--mnist DIR` takes
MNIST's four files instead.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rolora import atomic, cli, variants
from rolora.errors import BadInput
from rolora.experiments.digits import SPLITS, Digits, load
from rolora.experiments.two_layers import Setting, train

METHODS = "rolora,fedavg,ffa,flexlora"
HELP = """Two-layer network on digits split by label: accuracy of any methods against rounds and
bytes."""
FLAGS = [
    cli.Flag(
        ["--split"],
        metavar="|".join(SPLITS),
        default="10x1",
        help="clients x labels of each  [10x1]",
    ),
    cli.Flag(
        ["--methods"],
        default=METHODS,
        help=f"names, with options after a plus: rolora+balance, rolora+schedule=BBA  [{METHODS}]",
    ),
    cli.Flag(["--rounds"], type=int, default=100, help="[100]"),
    cli.Flag(
        ["--seeds"], type=int, default=5, help="runs a method, beside two that choose its rate  [5]"
    ),
    cli.Flag(
        ["--rates"],
        default="0.05,0.1,0.2,0.5,1,2,4,8,16",
        help="learning rates to choose from  [0.05,0.1,0.2,0.5,1,2,4,8,16]",
    ),
    cli.Flag(["--rank"], type=int, help="[8; 16 with --mnist]"),
    cli.Flag(
        ["--mnist"], metavar="DIR", help="a folder with MNIST's four IDX files, gzipped or not"
    ),
    cli.Flag(
        ["--output-dir"],
        metavar="DIR",
        help="toy.json and a picture go there; runs that are in toy.json are not repeated",
    ),
]
_TUNING_SEEDS = (1000, 1001)


def toy(
    split: str,
    methods: str,
    rounds: int,
    seeds: int,
    rates: str,
    rank: int | None,
    mnist: str | None,
    output_dir: str | None,
) -> int:
    if split not in SPLITS:
        raise BadInput(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    chosen, grid = variants.parse_all(methods), variants.rates(rates)
    for flag, value in (
        ("--rounds", rounds),
        ("--seeds", seeds),
        ("--rank", rank if rank is not None else 1),
    ):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected at least 1")
    data = "mnist" if mnist else "digits"
    rank = rank or (16 if mnist else 8)
    path = None if output_dir is None else Path(output_dir) / "toy.json"
    done = _Done(path, load(mnist))
    print(
        f"{data}, {split}, rank {rank}, {rounds} rounds; accuracy on the test set, mean ± std over "
        f"{seeds} seeds"
    )
    results = {}
    for method in chosen:
        first = Setting(method, split, grid[0], 0, rounds, rank, data)
        held = {
            rate: statistics.mean(
                done.run(replace(first, rate=rate, seed=seed), "held")["score"]
                for seed in _TUNING_SEEDS
            )
            for rate in grid
        }
        best = max(held, key=lambda rate: held[rate])
        results[method] = runs = [
            done.run(replace(first, rate=best, seed=seed), "test") for seed in range(seeds)
        ]
        edge = " (the edge of the grid)" if best in (grid[0], grid[-1]) and len(grid) > 1 else ""
        print(f"{method:<{max(map(len, chosen))}} rate {best:g}{edge}: {_told(runs)}", flush=True)
    if path is not None:
        _draw(results, path.parent / f"toy-{data}-{split}-r{rank}.png")
    return 0


class _Done:
    """Runs that are made once: those in the file at `path`, where one is given, are read."""

    def __init__(self, path: Path | None, digits: Digits):
        self.path, self.digits = path, digits
        self.rows: list[dict] = []
        if path is not None and path.is_file():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def run(self, setting: Setting, on: str) -> dict:
        wanted = asdict(setting) | {"on": on}
        for row in self.rows:
            if all(row[name] == value for name, value in wanted.items()):
                return row
        self.rows.append(train(setting, self.digits, on))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.path, json.dumps(self.rows) + "\n")
        return self.rows[-1]


def _told(runs: list[dict]) -> str:
    """Accuracy at the end and after 30 rounds, and what a client sends and is sent."""
    rounds = len(runs[0]["accuracy"])
    last, early = ([run["accuracy"][at] for run in runs] for at in (-1, min(29, rounds - 1)))
    up, down = (sum(runs[0][way]) / 1e3 for way in ("bytes_up", "bytes_down"))
    return (
        f"{statistics.mean(last):.3f} ± {_std(last):.3f}; "
        f"at round {min(30, rounds)} {statistics.mean(early):.3f}; {up:,.0f} kB up, "
        f"{down:,.0f} kB down a client"
    )


def _std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _draw(results: dict[str, list[dict]], path: Path) -> None:
    """Accuracy, mean and spread, against rounds and against the bytes that a client sends."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install '.[report]' in your clone")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
    for method, runs in results.items():
        curves = np.array([run["accuracy"] for run in runs])
        across = np.arange(1, curves.shape[1] + 1), np.cumsum(runs[0]["bytes_up"]) / 1e3
        for place, x in zip(axes, across, strict=True):
            place.plot(x, curves.mean(0), label=method)
            place.fill_between(
                x, curves.mean(0) - curves.std(0), curves.mean(0) + curves.std(0), alpha=0.2
            )
    axes[0].set(xlabel="round", ylabel="test accuracy")
    axes[1].set(xlabel="kB sent up by a client (fp32)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    for place in axes:
        place.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(**given: Any) -> int:
    return toy(**given)


command = cli.command("experiments.toy", HELP, FLAGS, run)

if __name__ == "__main__":
    cli.run(command)
