"""A simulated clock, and how slow each simulated client is.

Times are whole multiples of 2⁻¹⁰ simulated seconds, so that adding them up is exact: two clients
that are equally slow answer at the same instant, whatever was added before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rolora.federated import sampling

_TICKS = 10  # bits after the point of a simulated second
_MOST = 1e12  # seconds of one task; beyond it ticks would be lost
TAIL, SLOWER = 10, 10.0  # one of so many clients is so many times slower


def slowness(speeds: str, seed: int, client: int, clients: int) -> float:
    """How many times longer than a typical one a client takes, by its own key.

    equal: 1. uniform: between 0.5 and 1.5. lognormal: e^z, z standard normal, so that one client
    in twenty takes over five times the median. tail: 1, and 10 for one client of every ten.
    """
    if speeds == "uniform":
        return 0.5 + float(sampling.generator(seed, "speed", client).random())
    if speeds == "lognormal":
        return math.exp(float(sampling.generator(seed, "speed", client).standard_normal()))
    if speeds == "tail":
        ten, place = divmod(client, TAIL)
        slow = sampling.key64(seed, "slow", ten) % min(TAIL, clients)
        return SLOWER if place == slow else 1.0
    return 1.0


def ticked(seconds: float) -> float:
    """The nearest time that the clock can show, and at least one tick."""
    return math.ldexp(max(round(math.ldexp(seconds, _TICKS)), 1), -_TICKS)


@dataclass
class Clock:
    """Simulated seconds since the run began; it never runs backwards.

    duration(client): simulated seconds of one of its tasks. Without, there is no simulated time.
    """

    duration: Callable[[int], float] | None = None
    now: float = 0.0

    def due(self, client: int) -> float:
        """When a client that is asked now will answer; raises ValueError for a duration that no
        client can have.
        """
        if self.duration is None:
            return self.now
        seconds = self.duration(client)
        if not 0 <= seconds <= _MOST:  # also true for NaN
            raise ValueError(
                f"client {client} is said to take {seconds} simulated seconds, expected 0 to "
                f"{_MOST:g}"
            )
        return self.now + ticked(seconds)

    def advance(self, to: float) -> None:
        """It is `to` now, or still as late as it was: what is due in the past is due now."""
        self.now = max(self.now, to)

    def wait_for(self, clients: Iterable[int]) -> None:
        """A round that waits for all of them."""
        self.advance(max(map(self.due, clients), default=self.now))

    def row(self) -> dict[str, Any]:
        """What the record says of it."""
        return {} if self.duration is None else {"simulated_seconds": self.now}
