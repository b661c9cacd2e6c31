"""The row of a round in the record: what `metrics.jsonl` says of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rolora.federated.tally import Counted, Summed, Tally

Row = dict[str, Any]


def start(metrics: dict[str, float], seconds: float) -> Row:
    """Round 0: what is evaluated before any training."""
    nothing = Tally()
    return row(0, None, nothing, nothing) | {"eval": metrics, "attempts": 0, "seconds": seconds}


def row(number: int, phase: str | None, tally: Tally, attempts: Tally) -> Row:
    """A round whose last attempt is `tally`; `attempts` counts bytes and refusals of all of them.

    Evaluation, attempts and seconds are the server's to fill in.
    """
    counted, summed = tally.counted, tally.summed or _summed(tally.counted)
    losses = [c.loss for c in counted]
    return {
        "round": number,
        "phase": phase,
        "train_loss": summed.loss / summed.weight if summed.weight else None,
        "eval": None,
        "bytes_up": attempts.up,
        "bytes_down": attempts.down,
        "clients": len(tally.accepted),
        "rejected": attempts.reasons,
        "failures": attempts.failures,
        "examples": summed.examples,
        "tokens": summed.tokens,
        "norm": statistics.median(c.norm for c in counted) if counted else None,
        "client_loss": spread(losses),
    }


def spread(values: Iterable[float]) -> list[float] | None:
    """The least, the median and the largest; None of nothing."""
    found = sorted(values)
    return [found[0], statistics.median(found), found[-1]] if found else None


def _summed(counted: list[Counted]) -> Summed:
    """Losses weighted as the mean of changes is."""
    return Summed(
        sum(c.weight for c in counted),
        sum(c.loss * c.weight for c in counted),
        sum(c.examples for c in counted),
        sum(c.tokens for c in counted),
    )
