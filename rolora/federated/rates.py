"""The learning rate of a round's tasks."""

from __future__ import annotations

import math

from rolora.config import Optimisation


def learning_rate(options: Optimisation, rounds: int, phase: str, round: int) -> float:
    """Per phase, and scheduled over the rounds down to a tenth of where it began."""
    rates = {"A": options.lr_a, "B": options.lr_b}
    schedules = {"A": options.lr_schedule_a, "B": options.lr_schedule_b}
    base = rates.get(phase) or options.lr
    schedule = schedules.get(phase) or options.lr_schedule
    progress = (round - 1) / max(rounds - 1, 1)
    if schedule == "linear":
        return base * (1 - 0.9 * progress)
    if schedule == "cosine":
        return base * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    return base
