"""`python -m rolora.report RUN…`: run folders side by side, as a table and one picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rolora import atomic, cli, config
from rolora.errors import BadInput
from rolora.recipes import metrics
from rolora.run import labels, plots
from rolora.run.folder import CONFIG, METRICS, SUMMARY

HELP = """Draws any run folders together: the metric and the loss against rounds, bytes and
seconds, and how far clients are apart.

Runs that differ in nothing but their seed are one line, mean and standard deviation."""
FLAGS = [
    click.Argument(["runs"], nargs=-1, required=True, metavar="RUN…"),
    cli.Flag(
        ["--output", "-o"],
        metavar="FILE.png",
        default="report.png",
        help="the picture; a table goes beside it as .csv  [report.png]",
    ),
    cli.Flag(["--overwrite"], is_flag=True, help="replace what --output names"),
    cli.Flag(
        ["--target"],
        type=float,
        help="what rounds and bytes are counted to  [95 % of the best mean; a loss over it by 5 %]",
    ),
]
# What does not make two runs different methods: where, how fast, and which draw.
_IGNORED = {
    "seed",
    "output_dir",
    "engine",
    "cohort_chunk",
    "threads",
    "device",
    "backend",
    "checkpoint_every",
    "eval_every",
    "deadline",
}


@dataclass
class Run:
    """A run folder as the report sees it."""

    path: Path
    options: dict[str, Any]
    rows: list[dict]
    headline: str
    diverged: bool = False

    @property
    def final(self) -> float:
        """The headline of the last evaluation; the worst there is for a run that diverged."""
        if self.diverged:
            return metrics.worst(self.headline)
        return next(row["eval"][self.headline] for row in reversed(self.rows) if row["eval"])

    def first_at(self, target: float) -> dict | None:
        """Round, MB of messages up and down, and seconds until the headline first reaches `target`;
        None where it never does.
        """
        sent = seconds = 0.0
        for row in self.rows:
            sent, seconds = (
                sent + (row["bytes_up"] + row["bytes_down"]) / 1e6,
                seconds + row["seconds"],
            )
            if row["eval"] and metrics.is_reached(
                self.headline, row["eval"][self.headline], target
            ):
                return {"round": row["round"], "MB": sent, "seconds": seconds}
        return None


def read(path: Path) -> Run:
    """Raises BadInput for a folder that holds no run, or none with an evaluation."""
    if not (path / CONFIG).is_file() or not (path / METRICS).is_file():
        raise BadInput(
            f"{path} holds no run (no {CONFIG} and {METRICS}): give the --output-dir of one"
        )
    try:
        tables = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
        rows = [
            json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()
        ]
        summary = (
            json.loads((path / SUMMARY).read_text(encoding="utf-8"))
            if (path / SUMMARY).is_file()
            else {}
        )
        headline = _headline(rows, summary)
        options = {
            k: v for name, table in tables.items() if name != "resolved" for k, v in table.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error!s:.200}") from None
    if headline is None:
        raise BadInput(f"{path} has no evaluated round yet")
    return Run(path, options, rows, headline, "diverged" in summary)


def _headline(rows: list[dict], summary: dict) -> str | None:
    """The metric that the rows are judged by; None where none was evaluated. Raises KeyError or
    TypeError for rows without what a table needs.
    """
    found = [row["eval"] for row in rows if row["eval"]]
    for row in rows:
        row["round"] + row["bytes_up"] + row["bytes_down"] + row["seconds"]
    if not found:
        return None
    usual = next((name for name in ("accuracy", "loss") if name in found[0]), None)
    headline = summary.get("headline") or usual or next(iter(found[0]))
    for judged in found:
        judged[headline] + judged["loss"]
    return headline


def labelled(runs: list[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """(runs by what makes them different: the method, and as few options as tell them apart; the
    options in which they differ too).
    """
    known = config.options().keys() - _IGNORED
    found = labels.of(
        [{k: v for k, v in run.options.items() if k in known} | _method(run) for run in runs]
    )
    groups: dict[str, list[Run]] = {}
    for text, run in zip(found.texts, runs, strict=True):
        groups.setdefault(text, []).append(run)
    return groups, found.untold


def _method(run: Run) -> dict[str, str]:
    if "method" not in run.options:
        raise BadInput(f"{run.path / CONFIG} is damaged: it names no method")
    return {"method": run.options["method"]}


def table(groups: dict[str, list[Run]], target: float | None = None) -> tuple[list[dict], float]:
    """(a row for every group, the target that rounds and bytes were counted to): numbers, None
    where there is none. A target that most of a group's runs reach has their median.
    """
    means = [statistics.fmean(run.final for run in runs) for runs in groups.values()]
    if target is None:
        lower = metrics.lower_is_better(next(iter(groups.values()))[0].headline)
        target = min(means) / 0.95 if lower else 0.95 * max(means)
    lines = []
    for label, runs in groups.items():
        finals, reached = [run.final for run in runs], [run.first_at(target) for run in runs]
        hits = [hit for hit in reached if hit is not None]
        median = {
            key: statistics.median(hit[key] for hit in hits) if 2 * len(hits) > len(runs) else None
            for key in ("round", "MB")
        }
        lines.append(
            {
                "method": label,
                "runs": len(runs),
                "rounds": max(run.rows[-1]["round"] for run in runs),
                runs[0].headline: statistics.fmean(finals),
                "std": statistics.stdev(finals) if len(finals) > 1 else None,
                "rounds to target": median["round"],
                "MB to target": median["MB"],
                "MB up": statistics.fmean(
                    sum(row["bytes_up"] for row in run.rows) / 1e6 for run in runs
                ),
                "MB down": statistics.fmean(
                    sum(row["bytes_down"] for row in run.rows) / 1e6 for run in runs
                ),
                "seconds": statistics.fmean(
                    sum(row["seconds"] for row in run.rows) for run in runs
                ),
            }
        )
    return lines, target


def as_csv(lines: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(lines: list[dict]) -> str:
    """A table for a terminal and a README alike."""
    names = list(dict.fromkeys(key for line in lines for key in line))
    cells = [[_cell(name, line.get(name)) for name in names] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *cells))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if name.startswith("MB"):
            return f"{value:,.2f}"
        if name in ("seconds", "rounds to target"):
            return f"{value:,.0f}"
        return f"{value:.3g}" if name == "lr" else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def report(runs: tuple[str, ...], output: str, overwrite: bool, target: float | None) -> None:
    picture = Path(output)
    if picture.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--output {output}: expected a .png, .pdf or .svg file")
    for path in (picture, picture.with_suffix(".csv")):
        if path.exists() and not overwrite:
            raise BadInput(f"{path} exists: name another --output, or add --overwrite")
    found = [read(Path(run)) for run in dict.fromkeys(runs)]
    _require_trained(found)
    headlines = {run.headline for run in found}
    if len(headlines) > 1:
        raise BadInput(
            f"these runs have different metrics ({', '.join(sorted(headlines))}): report on them "
            "one kind at a time"
        )
    groups, untold = labelled(found)
    lines, target = table(groups, target)
    print(as_markdown(lines))
    print(f"\ntarget: {found[0].headline.replace('_', ' ')} {target:.4f}")
    if untold:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in untold)
        print(f"in no label, although these runs differ in it: {flags}")
    write(groups, lines, picture)


def _require_trained(runs: list[Run]) -> None:
    """Raises BadInput for runs that ended before a round was evaluated; says which diverged."""
    empty = [str(run.path) for run in runs if not run.diverged and run.rows[-1]["round"] == 0]
    if empty:
        raise BadInput(
            f"{', '.join(empty)} ended before the first round: leave it out, or go on with it"
        )
    diverged = [str(run.path) for run in runs if run.diverged]
    if len(diverged) == len(runs):
        raise BadInput(f"{', '.join(diverged)} diverged: there is nothing to show")
    for path in diverged:
        print(f"{path} diverged: it counts as 0 in the table")


def write(groups: dict[str, list[Run]], lines: list[dict], picture: Path) -> None:
    """The table as CSV beside the picture, and the picture where matplotlib is installed; says what
    was written.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(picture.with_suffix(".csv"), as_csv(lines))
    headline = next(iter(groups.values()))[0].headline
    drawn = plots.draw_together(
        {label: [run.rows for run in runs] for label, runs in groups.items()}, headline, picture
    )
    print(
        f"{picture.with_suffix('.csv')}"
        + (f", {picture}" if drawn else "; no picture: pip install '.[report]' in your clone")
    )


command = cli.command("report", HELP, FLAGS, report)

if __name__ == "__main__":
    cli.run(command)
