"""`python -m rolora.compare`: methods on the same data with the same budget, over seeds, each at
its own learning rate.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rolora import atomic, cli, config, report, variants
from rolora.errors import BadInput, Diverged
from rolora.recipes import metrics
from rolora.run.folder import CONFIG, SUMMARY, RunFolder
from rolora.train import resolved, resumed

HELP = """Trains every method with every seed and makes one table and one picture.

A method is a name with options after a plus, such as rolora+balance or
rolora+schedule=BBA+lr-b=0.01; every option of rolora.train is
a flag here too and holds for all. With --rates each method's learning rate is the best on a slice
of the training data, over seeds that
the results do not use. What is finished is not repeated: the same command goes on, and takes more
methods, seeds and rates."""
_OWN = {"method", "seed", "output_dir", "lr"}
FLAGS = [
    cli.Flag(
        ["--methods", "names"],
        metavar="M,M+option=value,…",
        default="rolora,fedavg,ffa",
        group="Comparison",
        help="what to compare  [rolora,fedavg,ffa]",
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
        ["--output-dir", "folder"],
        metavar="DIR",
        required=True,
        group="Comparison",
        help="runs, compare.csv and compare.png",
    ),
    cli.Flag(
        ["--config", "config_file"],
        metavar="FILE.toml",
        group="Configuration",
        help="options as TOML; flags win over it",
    ),
    cli.Flag(
        ["--preset"],
        metavar="NAME",
        group="Configuration",
        help="a named set of options; TOML and flags win",
    ),
    *cli.config_flags((config.options().keys() - _OWN) | {"lr"}),
]
_TUNING = 1000  # the first seed that judges rates
_SLICE = 0.15  # of the training data, where rates are chosen and no --validation-fraction is given


@dataclass
class Comparison:
    """Runs in `folder`, all of one base model in memory. `given` are the flags that hold for
    all.
    """

    folder: Path
    given: dict[str, Any]
    config_file: str | None
    preset: str | None
    shelf: Any = field(default=None)

    def run(self, name: str, place: str, **values: Any) -> report.Run:
        """The run of a variant with these options: the one in `folder`, finished where it is not,
        or a new one.
        """
        path = self.folder / place
        if not (path / SUMMARY).is_file():
            self._train(path, self.given | variants.parse(name) | values)
        return report.read(path)

    def _train(self, path: Path, values: dict[str, Any]) -> None:
        from rolora.hf.shelf import Shelf
        from rolora.run.session import Session

        again = (path / CONFIG).is_file()
        wanted = resolved(values | {"output_dir": str(path)}, self.config_file, self.preset)
        settled = resumed({"output_dir": str(path)}, None, None) if again else wanted
        self.shelf = self.shelf or Shelf()
        session = Session(settled, RunFolder(path), again, quiet=True, shelf=self.shelf)
        try:
            session.run()
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on", flush=True)
            raise
        except Diverged as error:
            RunFolder(path).summarise({"diverged": str(error), "headline": session.job.headline})

    def best_rate(self, name: str, rates: list[float], seeds: int) -> float:
        """The rate with the best mean, over seeds and the last two evaluations of each, on the
        validation slice; of equal ones that with the lowest loss.
        """
        scores: dict[float, tuple[float, float]] = {}
        for rate in rates:
            runs = [
                self.run(
                    name,
                    f"tuning/{_place(name)}-lr{rate:g}-seed{seed}",
                    lr=rate,
                    seed=seed,
                    validation_fraction=self.given.get("validation_fraction") or _SLICE,
                )
                for seed in range(_TUNING, _TUNING + seeds)
            ]
            headline = runs[0].headline
            value, loss = (
                statistics.fmean(_settled(run, metric) for run in runs)
                for metric in (headline, "loss")
            )
            scores[rate] = metrics.rank(headline, value, loss)
            print(
                f"{name}: lr {rate:g}: {headline} {value:.4f}, loss {loss:.4f} on the validation "
                f"slice, the mean of the last two evaluations and of {seeds} seeds",
                flush=True,
            )
        return min(scores, key=lambda rate: scores[rate])


def _settled(run: report.Run, metric: str) -> float:
    if run.diverged:
        return metrics.worst(metric)
    found = [row["eval"][metric] for row in run.rows if row["eval"]]
    return statistics.fmean(found[-2:])


def _place(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]", "-", name)


def compare(
    names: str,
    seeds: int,
    rates: str | None,
    tuning_seeds: int,
    long: int,
    target: float | None,
    folder: str,
    config_file: str | None,
    preset: str | None,
    **given: Any,
) -> None:
    given = {name: value for name, value in given.items() if value is not None}
    chosen, grid = variants.parse_all(names), variants.rates(rates) if rates else []
    for flag, value in (("--seeds", seeds), ("--tuning-seeds", tuning_seeds), ("--long", long)):
        if value < 1:
            raise BadInput(f"{flag} {value}: expected at least 1")
    if grid and "lr" in given:
        raise BadInput(
            "--lr and --rates exclude each other: give one rate for all, or rates to choose from"
        )
    for name in chosen:  # wrong options are told before any run
        resolved(given | variants.parse(name), config_file, preset)
    first = resolved(given, config_file, preset)
    if grid and first.data.train_file is not None and first.data.eval_file is None:
        raise BadInput(
            "--rates needs --eval-file: rates chosen and judged on the same slice would flatter"
        )
    runs = Comparison(Path(folder), given, config_file, preset)
    _remember(runs, first)
    groups: dict[str, list[report.Run]] = {}
    judged = (
        {}
        if first.data.train_file is not None and first.data.eval_file is None
        else {"validation_fraction": 0.0}
    )
    for name in chosen:
        own = variants.parse(name)
        rate = own.get("lr", first.optimisation.lr)  # None: the default, which the run settles
        if grid and "lr" not in own:
            rate = runs.best_rate(name, grid, tuning_seeds)
        shown = "default" if rate is None else f"{rate:g}"
        if len(grid) > 1 and rate in (grid[0], grid[-1]) and "lr" not in own:
            print(
                f"{name}: {shown} is the edge of --rates: a better one may lie beyond", flush=True
            )
        for times in dict.fromkeys((1, long)):
            label = name if times == 1 else f"{name}, {times} × the rounds"
            groups[label] = []
            for seed in range(seeds):
                place = f"runs/{_place(name)}-lr{shown}-seed{seed}" + (
                    "" if times == 1 else f"-x{times}"
                )
                run = runs.run(
                    name,
                    place,
                    lr=rate,
                    seed=seed,
                    rounds=own.get("rounds", first.federation.rounds) * times,
                    **judged,
                )
                groups[label].append(run)
                print(
                    f"{label}: lr {shown}, seed {seed}: "
                    + ("diverged" if run.diverged else f"{run.headline} {run.final:.4f}"),
                    flush=True,
                )
    groups = {
        label: groups[label] for label in sorted(groups, key=lambda label: " × the rounds" in label)
    }
    lines, target = report.table(groups, target)
    for line in lines:
        line["lr"] = groups[line["method"]][0].options["lr"]
    print("\n" + report.as_markdown(lines))
    print(
        f"\ntarget: {target:.4f}; same data and budget for all, MB of messages of all clients "
        "together"
    )
    report.write(groups, lines, runs.folder / "compare.png")


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
