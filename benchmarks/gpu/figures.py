"""The figures of the GPUs that have run this, for the docs: results/gpu/*.json, which are the
gpu.json of runs (results).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "results" / "gpu"
_HEADS = (
    "GPU",
    "M×N×K×r, phase",
    "frozen ms",
    "ours / frozen",
    "PEFT, same factor frozen / frozen",
    "by hand / frozen",
)
_SAME = ("M", "N", "K", "r", "phase", "p")


def table(folder: Path = FOLDER) -> None:
    """A row a GPU and layer without dropout; one row that says so where no GPU has run this."""
    print("| " + " | ".join(_HEADS) + " |")
    print("|" + "---|" * len(_HEADS))
    rows = [row for path in sorted(folder.glob("*.json")) for row in _rows(path)]
    for row in rows or [("no GPU has run this", *["–"] * (len(_HEADS) - 1))]:
        print("| " + " | ".join(row) + " |")


def _rows(path: Path) -> Iterator[tuple[str, ...]]:
    """What a run has measured of layers."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["about"]["smoke"] or not found["about"]["gpu"]:
        return
    layers: dict[tuple, dict[str, dict]] = {}
    for row in found["rows"]:
        if row["part"] == "layer" and "ms" in row and not row["p"]:
            place = tuple(row[name] for name in _SAME)
            layers.setdefault(place, {})[row["name"]] = row
    for (M, N, K, r, phase, _), named in layers.items():
        ours = [row["ratio_to_frozen"] for name, row in named.items() if name.startswith("ours")]
        if "frozen" in named and ours:
            cells = (f"{min(ours):.2f}", _ratio(named, "peft_phase"), _ratio(named, "manual"))
            frozen = f"{named['frozen']['ms']:.3g}"
            yield found["about"]["gpu"], f"{M}×{N}×{K}×{r}, {phase}", frozen, *cells


def _ratio(named: dict[str, dict], name: str) -> str:
    return f"{named[name]['ratio_to_frozen']:.2f}" if name in named else "–"
