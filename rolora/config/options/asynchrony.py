"""Options of rounds that do not wait for everybody, and of the simulated clock that they follow."""

from __future__ import annotations

from dataclasses import dataclass

from rolora.config.options.declared import option
from rolora.config.options.names import SPEEDS


@dataclass(frozen=True)
class Asynchrony:
    """Asynchronous rounds"""

    buffer: int | None = option(
        None,
        "FedBuff: a round ends after so many answers, while --clients-per-round clients train at "
        "any time; rounds wait for everybody if not given",
        least=1,
        metavar="K",
    )
    staleness_exponent: float | None = option(
        None,
        "an answer that is s rounds old counts (1 + s) to the minus this (0.5; 0: as a fresh one)",
        least=0,
        most=100,
    )
    staleness_limit: int | None = option(
        None, "refuse an answer that is more rounds old; none if not given", least=0, most=10**9
    )
    client_speeds: str | None = option(
        None,
        "simulate a clock; tail: one client of ten is ten times slower (equal with --buffer)",
        choices=SPEEDS,
    )
