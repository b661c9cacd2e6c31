"""Asynchronous rounds and the simulated clock, as a run's options say them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from rolora.config import Config, settled
from rolora.federated.buffered.clock import slowness
from rolora.federated.buffered.settings import Buffered
from rolora.run.job import Job

_TOLD = 10_000  # clients whose speeds a plan looks at


def settings(config: Config) -> Buffered | None:
    """How rounds are asynchronous; None where they wait for everybody."""
    own = config.asynchrony
    if own.buffer is None:
        return None
    return Buffered(own.buffer, settled(own.staleness_exponent), own.staleness_limit)


def durations(job: Job) -> Callable[[int], float] | None:
    """client → the simulated seconds of one of its tasks; None where no clock is simulated.

    A local step of a typical client takes one. Messages take none.
    """
    speeds, seed = job.config.asynchrony.client_speeds, job.config.run.seed
    if speeds is None:
        return None
    local, count = job.trainer().config, job.config.federation.clients

    def duration(client: int) -> float:
        steps = local.steps_for(len(job.clients[client]))
        return steps * slowness(speeds, seed, client, count)

    return duration


def clock_text(job: Job) -> str:
    """What the plan says of the clock."""
    duration = durations(job)
    assert duration is not None, "asked where there is one"
    speeds, count = job.config.asynchrony.client_speeds, job.config.federation.clients
    taken = [duration(client) for client in range(min(count, _TOLD))]
    of = "clients" if count <= _TOLD else f"first {_TOLD:,} clients"
    return (
        f"speeds are {speeds}: a task takes the {of} {min(taken):,.1f} to {max(taken):,.1f} "
        f"simulated seconds, the median one {statistics.median(taken):,.1f}; one is a local step"
    )


def text(config: Config) -> str:
    """What the plan says of asynchronous rounds."""
    own, at_a_time = settings(config), settled(config.federation.clients_per_round)
    assert own is not None, "asked where they are asynchronous"
    age = math.ceil(at_a_time / own.size) - 1
    old = "any age counts" if own.limit is None else f"over {own.limit} rounds it is refused"
    return (
        f"a round ends after {own.size} answers, {at_a_time} clients train at any time; an answer "
        f"counts (1 + its age in rounds)^-{own.exponent:g}, and is at most {age} old where clients "
        f"are as fast; {old}; a buffer for each phase"
    )
