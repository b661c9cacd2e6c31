"""`python -m rolora.compare`: methods on the same data with the same budget, over seeds, each at
its own learning rate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rolora import atomic, cli, config, report, variants
from rolora.comparison import Comparison, place_of
from rolora.config import WIRES
from rolora.errors import BadInput
from rolora.recipes import metrics
from rolora.reporting import table
from rolora.reporting.runs import Run
from rolora.run import front, plots
from rolora.train import resolved

HELP = """Trains every method with every seed and makes one table and one picture.

A method is a name with options after a plus, such as rolora+balance or
rolora+schedule=BBA+lr-b=0.01; every option of rolora.train is
a flag here too and holds for all. With --rates each method's learning rate is the best on a slice
of the training data, over seeds that the results do not use. With --wires each method runs at each
precision of its messages, at the rate that suits it at the first. What is finished is not repeated:
the same command goes on, and takes more methods, wires, seeds and rates."""
_OWN = {"method", "seed", "output_dir", "lr"}
FLAGS = [
    cli.Flag(
        ["--methods", "names"],
        metavar="M,M+option=value,…",
        default="rolora,fedavg,ffa",
        group="Comparison",
        help="what to compare  [rolora,fedavg,ffa]",
    ),
    cli.Flag(
        ["--wires"],
        metavar="W,W,…",
        group="Comparison",
        help=f"precisions of the messages to cross the methods with, of {', '.join(WIRES)}",
    ),
    cli.Flag(["--seeds"], type=int, default=3, group="Comparison", help="runs of each  [3]"),
    cli.Flag(
        ["--rates"],
        metavar="LR,LR,…",
        group="Comparison",
        help="learning rates to choose from; --lr for all if not given",
    ),
    cli.Flag(
        ["--tuning-seeds"],
        type=int,
        default=2,
        group="Comparison",
        help="runs that judge a rate  [2]",
    ),
    cli.Flag(
        ["--long"],
        type=int,
        default=1,
        group="Comparison",
        help="also run so many times the rounds, at the same rate  [1]",
    ),
    cli.Flag(
        ["--target"],
        type=float,
        group="Comparison",
        help="what rounds and bytes are counted to  [95 % of the best mean]",
    ),
    cli.Flag(
        ["--budget-bytes"],
        type=float,
        metavar="BYTES",
        group="Comparison",
        help="of messages of all clients: also tell what each method reaches within them",
    ),
    cli.Flag(
        ["--output-dir", "folder"],
        metavar="DIR",
        required=True,
        group="Comparison",
        help="runs, compare.csv and compare.png, front.csv and front.png",
    ),
    cli.Flag(
        ["--config", "config_file"],
        metavar="FILE.toml",
        group="Configuration",
        help="options as TOML; flags win over it",
    ),
    cli.Flag(
        ["--preset"],
        metavar="NAME,…",
        group="Configuration",
        help="as for rolora.train: a named set of options, paper, or both; TOML and flags win",
    ),
    *cli.config_flags((config.options().keys() - _OWN) | {"lr"}),
]


def compare(
    names: str,
    seeds: int,
    rates: str | None,
    tuning_seeds: int,
    long: int,
    target: float | None,
    budget_bytes: float | None,
    wires: str | None,
    folder: str,
    config_file: str | None,
    preset: str | None,
    **given: Any,
) -> None:
    """Trains what is missing of the runs, then writes their tables and pictures.

    Raises BadInput before any run for what cannot be.
    """
    given = {name: value for name, value in given.items() if value is not None}
    grid = variants.rates(rates) if rates else []
    for flag, value in (("--seeds", seeds), ("--tuning-seeds", tuning_seeds), ("--long", long)):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected at least 1")
    if budget_bytes is not None and not budget_bytes > 0:
        raise BadInput(f"--budget-bytes {budget_bytes:g}: expected a positive number of bytes")
    crossed = variants.crossed(variants.parse_all(names), wires, given)
    for variant in crossed:  # wrong options are told before any run
        resolved(given | variants.parse(variant.text), config_file, preset)
    first = resolved(given, config_file, preset)
    _require_judge(grid, given, first)
    runs = Comparison(Path(folder), given, config_file, preset)
    _remember(runs, first)
    groups: dict[str, list[Run]] = {}
    points: list[tuple[front.Point, list[Run]]] = []
    tuned: dict[str, float] = {}
    for variant in crossed:
        if grid and variant.method not in tuned and "lr" not in variants.parse(variant.text):
            tuned[variant.method] = runs.best_rate(variant.text, grid, tuning_seeds)
        rate = _rate(variant, first, grid, tuned)
        for times in dict.fromkeys((1, long)):
            label = variant.label if times == 1 else f"{variant.label}, {times} × the rounds"
            groups[label] = group = _trained(runs, first, variant, label, rate, times, seeds)
            wire = group[0].options["exchange_dtype"]
            points.append((front.point(variant.method, wire, group), group))
    groups = dict(sorted(groups.items(), key=lambda item: " × the rounds" in item[0]))
    lines, target = table.of(groups, target)
    for line in lines:
        line["lr"] = groups[line["method"]][0].options["lr"]
    print("\n" + table.as_markdown(lines))
    print(
        f"\ntarget: {target:.4f}; same data and budget for all, MB of messages of all clients "
        "together"
    )
    report.write(groups, lines, runs.folder / "compare.png")
    _write_front(points, target, budget_bytes, runs.folder / "front.png")


def _held_out(settled: config.Config) -> bool:
    """Whether the data that the results are judged on are a slice of the training file."""
    return settled.data.train_file is not None and settled.data.eval_file is None


def _require_judge(grid: list[float], given: dict[str, Any], settled: config.Config) -> None:
    """Raises BadInput for rates that would exclude each other, or flatter."""
    if grid and "lr" in given:
        raise BadInput(
            "--lr and --rates exclude each other: give one rate for all, or rates to choose from"
        )
    if grid and _held_out(settled):
        raise BadInput(
            "--rates needs --eval-file: rates chosen and judged on the same slice would flatter"
        )


def _rate(
    variant: variants.Crossed, settled: config.Config, grid: list[float], tuned: dict[str, float]
) -> float | None:
    """A variant's own rate, the tuned one of its method, or that for all; None is the default,
    which the run settles.
    """
    own = variants.parse(variant.text)
    if "lr" in own:
        return own["lr"]
    rate = tuned.get(variant.method, settled.optimisation.lr)
    if len(grid) > 1 and rate in (grid[0], grid[-1]):
        print(
            f"{variant.text}: {rate:g} is the edge of --rates: a better one may lie beyond",
            flush=True,
        )
    return rate


def _trained(
    runs: Comparison,
    settled: config.Config,
    variant: variants.Crossed,
    label: str,
    rate: float | None,
    times: int,
    seeds: int,
) -> list[Run]:
    """A variant's run with each seed, `times` as long; a line is printed for each."""
    own, shown = variants.parse(variant.text), "default" if rate is None else f"{rate:g}"
    rounds = own.get("rounds", settled.federation.rounds) * times
    more = {} if _held_out(settled) else {"validation_fraction": 0.0}
    group = []
    for seed in range(seeds):
        place = f"runs/{place_of(variant.text)}-lr{shown}-seed{seed}"
        if times != 1:
            place += f"-x{times}"
        run = runs.run(variant.text, place, lr=rate, seed=seed, rounds=rounds, **more)
        group.append(run)
        reached = "diverged" if run.diverged else f"{run.headline} {run.final:.4f}"
        print(f"{label}: lr {shown}, seed {seed}: {reached}", flush=True)
    return group


def _write_front(
    points: list[tuple[front.Point, list[Run]]],
    target: float,
    budget: float | None,
    picture: Path,
) -> None:
    """Says what each method reached at what cost, and which no other beats; table and picture."""
    lines = front.table(points, target, budget)
    print("\n" + table.as_markdown(lines))
    atomic.write_text(picture.with_suffix(".csv"), table.as_csv(lines))
    headline = points[0][1][0].headline
    lower = metrics.lower_is_better(headline)
    drawn = plots.draw_front([point for point, _ in points], headline, lower, picture)
    print(f"\n{picture.with_suffix('.csv')}" + (f", {picture}" if drawn else ""))


def _remember(runs: Comparison, settled: config.Config) -> None:
    """Notes what holds for all runs of the folder; raises BadInput where it held something else."""
    path = runs.folder / "compare.json"
    shared = {k: v for k, v in settled.values().items() if k not in _OWN and v is not None}
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            raise BadInput(f"{path} is damaged: restore it, or give another folder") from None
        for key in sorted(before.keys() | shared.keys()):
            if before.get(key) != shared.get(key):
                raise BadInput(
                    f"--output-dir {runs.folder} holds a comparison with --{key.replace('_', '-')} "
                    f"{before.get(key)}, now "
                    f"{shared.get(key)}: give another folder"
                )
    elif runs.folder.exists() and (not runs.folder.is_dir() or any(runs.folder.iterdir())):
        raise BadInput(f"--output-dir {runs.folder} holds other files: give a new or empty folder")
    runs.folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(shared, indent=1) + "\n")


command = cli.command("compare", HELP, FLAGS, compare)

if __name__ == "__main__":
    cli.run(command)
