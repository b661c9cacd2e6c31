"""The learning rate: the one that fits a model where none is given, and that of a round."""

from __future__ import annotations

import math

from rolora.config import Optimisation

# Chosen on four small jobs, of 128 and 384 channels (benchmarks/results/rates.json): AdamW moves
# every entry of a factor by about the rate, so what a step does to an output grows with the width
# and with alpha / rank. That it holds for wider models is not measured.
_ADAMW = 2.0
_SGD = 0.1  # of gradients clipped to norm 1; tried on one of those jobs


def fitting_rate(optimizer: str, width: int, scaling: float) -> float:
    """A rate to start from, for adapters on linears of `width` inputs scaled by `scaling`: two
    significant digits.
    """
    rate = _SGD if optimizer == "sgd" else _ADAMW / (width * scaling)
    return float(f"{rate:.1e}")


def learning_rate(options: Optimisation, rounds: int, phase: str, round: int) -> float:
    """Per phase, and scheduled over the rounds down to `lr_end` of where it began."""
    rates = {"A": options.lr_a, "B": options.lr_b}
    schedules = {"A": options.lr_schedule_a, "B": options.lr_schedule_b}
    base = rates.get(phase) or options.lr
    assert base is not None, "settled when the model is there"
    schedule = schedules.get(phase) or options.lr_schedule
    progress = (round - 1) / max(rounds - 1, 1)
    end = options.lr_end
    if schedule == "linear":
        return base * (1 - (1 - end) * progress)
    if schedule == "cosine":
        return base * (end + (1 - end) / 2 * (1 + math.cos(math.pi * progress)))
    return base
