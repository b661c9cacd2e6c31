"""Metrics by name: which way is better, and which of several runs is best."""

from __future__ import annotations

import math

_LOWER = ("loss", "perplexity")


def lower_is_better(name: str) -> bool:
    """Of `loss` and `perplexity`, and of every name whose last word is one of them."""
    return name.rpartition("_")[2] in _LOWER


def worst(name: str) -> float:
    """What a run that diverged counts as."""
    return math.inf if lower_is_better(name) else 0.0


def is_reached(name: str, value: float, target: float) -> bool:
    return value <= target if lower_is_better(name) else value >= target


def rank(name: str, value: float, loss: float) -> tuple[float, float]:
    """Sorts the best first: by the metric, and by the loss where that is equal."""
    return (value if lower_is_better(name) else -value), loss
