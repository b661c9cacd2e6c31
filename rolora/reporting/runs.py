"""Run folders as a report sees them."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora import config
from rolora.errors import BadInput
from rolora.recipes import metrics
from rolora.run import labels
from rolora.run.folder import CONFIG, METRICS, SUMMARY

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
    """A run folder as the report sees it. `ended`: the round after which it was summed up."""

    path: Path
    options: dict[str, Any]
    rows: list[dict]
    headline: str
    diverged: bool = False
    ended: int | None = None

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
    return Run(path, options, rows, headline, "diverged" in summary, summary.get("rounds"))


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
