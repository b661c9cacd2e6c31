"""How one process trains its clients: measured once where nobody says it, and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from rolora.cohort.choose import CannotBatch, Engine, choose
from rolora.config import Config, settled
from rolora.errors import BadInput
from rolora.federated.methods import Method
from rolora.federated.rates import learning_rate
from rolora.run.job import Job
from rolora.transport.ranks import Ranks


def settled_for(
    config: Config, job: Job, method: Method, ranks: Ranks | None, say: Callable[[str], None]
) -> Config:
    """The configuration with its engine settled, which is the same when the run is resumed."""
    f, system = config.federation, config.system
    if system.engine == "auto" and system.cuda_graphs == "on":
        return config.with_values(engine="sequential")  # which graphs are of
    if system.engine == "sequential":
        return config
    try:
        engine = choose(
            system.engine,
            system.cohort_chunk,
            job.trainer(),
            job.report.heads,
            method.phase(1),
            learning_rate(config.optimisation, f.rounds, method.phase(1), 1),
            settled(f.clients_per_round),
        )
    except CannotBatch as error:
        raise BadInput(f"--engine batched: {error}: use --engine sequential") from None
    if ranks is not None:  # one engine for all, the first rank's
        engine = Engine(**ranks.first(asdict(engine)))
    say(f"engine: {engine.name} ({engine.reason})")
    chunk = engine.chunk if engine.name == "batched" else None
    return config.with_values(engine=engine.name, cohort_chunk=chunk)
