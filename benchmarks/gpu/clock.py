"""How long a call takes on the device: launches are queued before the first of them begins, so
that Python's time is not in it, and inputs change from call to call, so that the L2 holds none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CYCLES_A_SECOND = 2e9  # of torch.cuda._sleep, at most
LONGEST = 60e-3  # seconds that the device is kept waiting for launches to queue up


@dataclass(frozen=True)
class Sample:
    """Milliseconds of a call on the device and in Python; whether all launches were queued before
    the first one began (where not, `ms` has waits for Python in it).
    """

    ms: float
    host_ms: float
    queued: bool


class Clock:
    """`call(i)` is the i-th call: with the i-th of several inputs."""

    def __init__(self, device: str):
        self.device, self.turn = device, 0
        self._wait: dict[object, float] = {}  # call → seconds to wait for its launches

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def sample(self, call: Callable[[int], object], inner: int = 1) -> Sample:
        """The mean of `inner` calls."""
        if self.device != "cuda":
            began = time.perf_counter()
            self._calls(call, inner)
            ms = 1e3 * (time.perf_counter() - began) / inner
            return Sample(ms, ms, True)
        while True:
            wait = self._wait.get(call, 2e-3)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(wait * CYCLES_A_SECOND))
            start.record()
            began = time.perf_counter()
            self._calls(call, inner)
            host = time.perf_counter() - began
            queued = not start.query()
            end.record()
            end.synchronize()
            if queued or wait >= LONGEST:
                return Sample(start.elapsed_time(end) / inner, 1e3 * host / inner, queued)
            self._wait[call] = min(LONGEST, max(2 * wait, 1.5 * host))

    def _calls(self, call: Callable[[int], object], inner: int) -> None:
        for _ in range(inner):
            call(self.turn)
            self.turn += 1


def copies(nbytes: int, l2_bytes: int) -> int:
    """How many inputs of `nbytes` in turn leave none of themselves in the L2."""
    return max(1, min(32, -(-4 * l2_bytes // max(1, nbytes))))
