"""Run folders as an HTML page: those of a report, or whatever is there at this moment."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rolora.errors import BadInput
from rolora.reporting import page, table
from rolora.reporting.runs import Run, labelled, read
from rolora.run import plots
from rolora.run.folder import METRICS, SAMPLES, SUMMARY

_WATCHED = (METRICS, SUMMARY, SAMPLES)
NO_PICTURE = "no picture: pip install '.[report]' in your clone"


def static(groups: Mapping[str, list[Run]], lines: list[dict], notes: Sequence[str]) -> str:
    """The page of a report's groups and the table of them."""
    runs = [run for own in groups.values() for run in own]
    return _text(groups, lines, list(notes), runs, live=False)


class Live:
    """The page of run folders that may still be written, made anew when one has changed."""

    def __init__(self, paths: Sequence[Path], target: float | None = None):
        self._paths, self._target = paths, target
        self._seen: list[tuple[int, int]] | None = None
        self._page = ""

    def page(self) -> str:
        """The whole page as it is now."""
        seen = [_mark(path / name) for path in self._paths for name in _WATCHED]
        if seen != self._seen:
            self._page, self._seen = self._made(), seen
        return self._page

    def _made(self) -> str:
        notes, runs = [], []
        for path in self._paths:
            try:
                runs.append(read(path))
            except BadInput as error:
                notes.append(str(error))
        trained = [run for run in runs if run.diverged or run.rows[-1]["round"] > 0]
        groups: dict[str, list[Run]] = {}
        lines: list[dict] = []
        if len({run.headline for run in trained}) > 1:
            notes.append("these runs have different metrics: no table holds them together")
        elif not all(run.diverged for run in trained):
            groups, _ = labelled(trained)
            lines, target = table.of(groups, self._target)
            notes.insert(0, table.target_text(trained[0].headline, target))
        return _text(groups, lines, notes, runs, live=True)


def _mark(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        known = path.stat()
    except OSError:
        return (0, 0)
    return (known.st_mtime_ns, known.st_size)


def _text(
    groups: Mapping[str, list[Run]],
    lines: list[dict],
    notes: list[str],
    runs: Sequence[Run],
    live: bool,
) -> str:
    picture = _picture(groups) if groups else None
    if groups and picture is None:
        notes.append(NO_PICTURE)
    names = _names([run.path for run in runs])
    sections = [_section(run, name) for run, name in zip(runs, names, strict=True)]
    return page.text(table.cells(lines), notes, picture, sections, live)


def _picture(groups: Mapping[str, list[Run]]) -> bytes | None:
    """As SVG; None without matplotlib."""
    headline = next(iter(groups.values()))[0].headline
    rows = {label: [run.rows for run in runs] for label, runs in groups.items()}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "picture.svg"
        if not plots.draw_together(rows, headline, path):
            return None
        return path.read_bytes()


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names; with as much of what is above as tells them apart."""
    parts = [path.absolute().parts for path in paths]
    depth = 1
    while len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(own[-depth:]) for own in parts]


def _section(run: Run, name: str) -> page.Section:
    rounds = run.rows[-1]["round"]
    state = f"round {rounds} of {run.options.get('rounds', '?')}"
    if run.diverged:
        state = f"diverged after round {rounds}"
    elif run.ended == rounds:
        took = math.fsum(row["seconds"] for row in run.rows)
        state = f"finished after round {rounds}, {took:,.0f} seconds of rounds"
    return page.Section(name, state, run.rows, run.options, _samples(run.path))


def _samples(path: Path) -> list[tuple[str, str, str]]:
    """Those of the last evaluation; none where the file cannot be read."""
    try:
        lines = (path / SAMPLES).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        last = max((sample["round"] for sample in found), default=0)
        return [
            (str(sample["prompt"]), str(sample["written"]), str(sample["reference"]))
            for sample in found
            if sample["round"] == last
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return []
