"""What methods cost and what they reach, side by side: the points that no other beats, bytes to a
target and quality within a budget of bytes.

A point is one method at one wire and one number of rounds, over its seeds. Bytes are of messages of
all clients together, counted two ways: up, from clients to the server, and both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rolora.recipes import metrics

WAYS = ("up", "both")
_UP = ("bytes_up",)
_BOTH = ("bytes_up", "bytes_down")
_KEYS = dict(zip(WAYS, (_UP, _BOTH), strict=True))


class Run(Protocol):
    """What is looked at of a run: its rows, and the headline of its last evaluation."""

    @property
    def rows(self) -> list[dict[str, Any]]: ...

    @property
    def headline(self) -> str: ...

    @property
    def final(self) -> float: ...


@dataclass(frozen=True)
class Point:
    """`value` is the mean over a group's runs, `error` its standard error (None of one run); `MB`
    the mean megabytes by way.
    """

    method: str
    wire: str
    rounds: int
    value: float
    error: float | None
    MB: dict[str, float]


def point(method: str, wire: str, runs: Sequence[Run]) -> Point:
    """The point of one method's runs at one wire, which differ in nothing but their seed."""
    finals = [run.final for run in runs]
    return Point(
        method,
        wire,
        max(run.rows[-1]["round"] for run in runs),
        statistics.fmean(finals),
        statistics.stdev(finals) / len(finals) ** 0.5 if len(finals) > 1 else None,
        {way: statistics.fmean(_sent(run.rows, way) for run in runs) for way in WAYS},
    )


def front(points: Sequence[Point], way: str, lower: bool) -> list[Point]:
    """The points that no other beats, by rising cost: whatever costs as little or less is worse.

    lower: whether a smaller value is the better one. Of points that are equal all are there.
    """
    sign = -1.0 if lower else 1.0

    def beaten(one: Point) -> bool:
        return any(
            other.MB[way] <= one.MB[way]
            and sign * other.value >= sign * one.value
            and (other.MB[way], other.value) != (one.MB[way], one.value)
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p.MB[way])


def within(run: Run, way: str, budget: float) -> float | None:
    """The headline of the last evaluation that a run came to with `budget` bytes; None where the
    first round costs more.
    """
    sent, found = 0.0, None
    for row in run.rows:
        sent += sum(row[key] for key in _KEYS[way])
        if sent > budget:
            break
        if row["eval"] and row["round"] > 0:
            found = row["eval"][run.headline]
    return found


def megabytes_to(run: Run, way: str, target: float) -> float | None:
    """Megabytes sent until an evaluation first reaches `target`; None where none does."""
    sent = 0.0
    for row in run.rows:
        sent += sum(row[key] for key in _KEYS[way]) / 1e6
        if row["eval"] and metrics.is_reached(run.headline, row["eval"][run.headline], target):
            return sent
    return None


def table(
    groups: Sequence[tuple[Point, Sequence[Run]]], target: float, budget: float | None
) -> list[dict[str, Any]]:
    """A row for every point: what it reached and sent, whether it is on either front, the median
    megabytes to the target (None where half of the runs do not reach it), and the mean within the
    budget, where one is given and every run has an evaluation within it.
    """
    headline = groups[0][1][0].headline
    lower = metrics.lower_is_better(headline)
    points = [point for point, _ in groups]
    fronts = {way: front(points, way, lower) for way in WAYS}
    lines = []
    for one, runs in groups:
        line: dict[str, Any] = {
            "method": one.method,
            "wire": one.wire,
            "rounds": one.rounds,
            headline: one.value,
            "standard error": one.error,
        }
        for way in WAYS:
            line[f"MB {way}"] = one.MB[way]
            line[f"front, {way}"] = "yes" if one in fronts[way] else "no"
            line[f"MB {way} to target"] = _median([megabytes_to(run, way, target) for run in runs])
            if budget is not None:
                found = [within(run, way, budget) for run in runs]
                line[f"within {budget / 1e6:g} MB {way}"] = _mean(found)
        lines.append(line)
    return lines


def _sent(rows: list[dict[str, Any]], way: str) -> float:
    return sum(row[key] for row in rows for key in _KEYS[way]) / 1e6


def _median(found: list[float | None]) -> float | None:
    hits = [value for value in found if value is not None]
    return statistics.median(hits) if 2 * len(hits) > len(found) else None


def _mean(found: list[float | None]) -> float | None:
    hits = [value for value in found if value is not None]
    return statistics.fmean(hits) if len(hits) == len(found) else None
