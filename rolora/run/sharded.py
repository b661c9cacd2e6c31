"""Runs whose frozen base lies in parts on the processes of one owner (`--base-sharding`).

Every rank trains every client, on the same examples: what they compute is the same bits, so nothing
but frozen weights travels between them. Rank 0 alone writes.
"""

from __future__ import annotations

from pathlib import Path

from rolora.cohort.sequential import Cohort
from rolora.config import Config
from rolora.errors import BadInput
from rolora.hf import sharding
from rolora.transport.local import LocalTransport
from rolora.transport.ranks import Ranks


class ShardedTransport(LocalTransport):
    """LocalTransport on every rank, all of which train all clients; rank 0's keeps to disk."""

    def __init__(self, cohort: Cohort, message_limit: int, ranks: Ranks, states: Path | None):
        super().__init__(cohort, message_limit, None, states if ranks.rank == 0 else None)
        self.leads = ranks.rank == 0


def in_step(config: Config) -> Config:
    """The configuration of such a run, others as they are. Raises BadInput for what its ranks could
    not do in step, and where torchrun did not start this process.
    """
    system, f, p = config.system, config.federation, config.privacy
    if not system.base_sharding:
        return config
    sharding.count()
    together = "its ranks must do the same in step"
    for flag, given, why in (
        ("--engine batched", system.engine == "batched", "it halves its chunks by its own memory"),
        (f"--quantize {system.quantize}", system.quantize != "none", "only dense weights are cut"),
        (f"--init {config.adapter.init}", config.adapter.init in ("pissa", "olora"), "it is whole"),
        ("--deadline", f.deadline is not None, f"{together}, and their clocks differ"),
        ("--sampling poisson", f.sampling == "poisson", f"{together}, and each would draw its own"),
        ("--dp-clip", p.dp_clip is not None, f"{together}, and each would draw its own noise"),
        ("--secure-aggregation", p.secure_aggregation, f"{together}, and keys are secret"),
        ("--samples", config.run.samples > 0, "one rank alone would write, and cannot compute"),
        ("--buffer", config.asynchrony.buffer is not None, "not built for ranks"),
    ):
        if given:
            raise BadInput(
                f"--base-sharding does not go with {flag} ({why}): leave one of them out"
            )
    return config.with_values(engine="sequential")
