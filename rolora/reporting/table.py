"""Groups of runs as the lines of a table: CSV, Markdown, text."""

from __future__ import annotations

import csv
import io
import statistics
from typing import Any

from rolora.recipes import metrics
from rolora.reporting.runs import Run


def of(groups: dict[str, list[Run]], target: float | None = None) -> tuple[list[dict], float]:
    """(a row for every group, the target that rounds and bytes were counted to): numbers, None
    where there is none. A target that most of a group's runs reach has their median.
    """
    means = [statistics.fmean(run.final for run in runs) for runs in groups.values()]
    if target is None:
        lower = metrics.lower_is_better(next(iter(groups.values()))[0].headline)
        target = min(means) / 0.95 if lower else 0.95 * max(means)
    made = []
    for label, runs in groups.items():
        finals, reached = [run.final for run in runs], [run.first_at(target) for run in runs]
        hits = [hit for hit in reached if hit is not None]
        median = {
            key: statistics.median(hit[key] for hit in hits) if 2 * len(hits) > len(runs) else None
            for key in ("round", "MB")
        }
        made.append(
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
    return made, target


def as_csv(lines: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def cells(lines: list[dict]) -> list[list[str]]:
    """The head and the lines, as a person reads them; nothing of no lines."""
    names = list(dict.fromkeys(key for line in lines for key in line))
    if not names:
        return []
    return [names, *([_cell(name, line.get(name)) for name in names] for line in lines)]


def as_markdown(lines: list[dict]) -> str:
    """A table for a terminal and a README alike."""
    names, *rows = cells(lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))


def target_text(headline: str, target: float) -> str:
    """What rounds and bytes are counted to."""
    return f"target: {headline.replace('_', ' ')} {target:.4f}"


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
