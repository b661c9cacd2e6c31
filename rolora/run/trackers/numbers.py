"""The numbers of a recorded round, by the names that trackers group them under."""

from __future__ import annotations

from collections.abc import Sequence

_PLAIN = {
    "train_loss": "train/loss",
    "tokens": "train/tokens",
    "examples": "train/examples",
    "norm": "train/median_norm",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "clients": "clients/counted",
    "attempts": "clients/attempts",
    "epsilon": "privacy/epsilon",
    "term_rank": "term/rank",
    "term_error": "term/error",
    "simulated_seconds": "system/simulated_seconds",
    "training": "clients/training",
    "seconds": "system/seconds",
    "peak_memory_bytes": "system/peak_memory_bytes",
}
_SPREAD = ("least", "median", "largest")


def of(rows: Sequence[dict]) -> dict[str, float]:
    """The last of `rows`, all rounds up to it, as numbers; what it has none of is left out."""
    row = rows[-1]
    found = {}
    for name, shown in _PLAIN.items():
        if row.get(name) is not None:
            found[shown] = float(row[name])
    for name, value in (row.get("eval") or {}).items():
        found[f"eval/{name}"] = float(value)
    losses = row.get("client_loss")
    if losses is not None:
        for name, value in zip(_SPREAD, losses, strict=True):
            found[f"clients/loss_{name}"] = float(value)
    if row.get("staleness") is not None:
        for name, value in zip(_SPREAD, row["staleness"], strict=True):
            found[f"clients/staleness_{name}"] = float(value)
    found["clients/rejected"] = float(sum(row.get("rejected", {}).values()))
    found["bytes/total"] = float(sum(past["bytes_up"] + past["bytes_down"] for past in rows))
    return found
