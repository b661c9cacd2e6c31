"""Runs and clients whose frozen base lies in parts on the processes of one owner
(`--base-sharding`).

Every rank trains every client, on the same examples: what they compute is the same bits, so nothing
but frozen weights travels between them. Rank 0 alone writes, or speaks to the server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from rolora.config import Config
from rolora.errors import BadInput
from rolora.federated.layout import Layout
from rolora.hf import sharding
from rolora.transport.ranks import Ranks, join

Answer = Callable[[bytes], bytes]
Excluded = tuple[str, bool, str]  # flag, whether it is given, why not
_IN_STEP = "its ranks must do the same in step"


def divide(model: nn.Module, device: torch.device, layout: Layout, heads: Sequence[str]) -> None:
    """Leaves this rank its part of the frozen base; what travels, and the modules `heads` that are
    saved beside it, stay whole.
    """
    join(device)
    whole = [p for kind in layout.sizes for p in layout.parameters(model, kind)]
    whole += [p for head in heads for p in model.get_submodule(head).parameters()]
    sharding.shard(model, device, whole)


def of_a_run(config: Config, elsewhere: bool) -> Config:
    """The configuration of such a run, others as they are; `elsewhere`: its clients are. Raises
    BadInput for what its ranks could not do, and where torchrun did not start this process.
    """
    f, p = config.federation, config.privacy
    if not config.system.base_sharding:
        return config
    if elsewhere:
        raise BadInput(
            "--base-sharding: clients elsewhere say so themselves (rolora.worker --base-sharding): "
            "take it out of the configuration"
        )
    batched = config.system.engine == "batched"
    return _of_ranks(
        config,
        ("--engine batched", batched, "it halves its chunks by its own memory"),
        ("--deadline", f.deadline is not None, f"{_IN_STEP}, and their clocks differ"),
        ("--sampling poisson", f.sampling == "poisson", f"{_IN_STEP}, and each would draw its own"),
        ("--dp-clip", p.dp_clip is not None, f"{_IN_STEP}, and each would draw its own noise"),
        ("--samples", config.run.samples > 0, "one rank alone would write, and cannot compute"),
        ("--buffer", config.asynchrony.buffer is not None, "it is not built for ranks"),
    )


def of_a_client(config: Config) -> Config:
    """The configuration of a client elsewhere that is several processes; raises as `of_a_run`."""
    return _of_ranks(config.with_values(base_sharding=True))


def _of_ranks(config: Config, *excluded: Excluded) -> Config:
    quantize, init = config.system.quantize, config.adapter.init
    always: tuple[Excluded, ...] = (
        (f"--quantize {quantize}", quantize != "none", "only dense weights are cut"),
        (f"--init {init}", init in ("pissa", "olora"), "its term is whole on every rank"),
        (
            "--secure-aggregation",
            config.privacy.secure_aggregation,
            f"{_IN_STEP}, and keys are drawn by each",
        ),
    )
    sharding.count()
    for flag, given, why in (*always, *excluded):
        if given:
            raise BadInput(
                f"--base-sharding does not go with {flag} ({why}): leave one of them out"
            )
    return config.with_values(engine="sequential")


@contextmanager
def leading(ranks: Ranks, answer: Answer) -> Iterator[Answer]:
    """Rank 0's answers, which every other rank computes with it; those end with the context."""
    one_at_a_time = threading.Lock()

    def together(request: bytes) -> bytes:
        with one_at_a_time:
            ranks.broadcast(request)
            return answer(request)

    try:
        yield together
    finally:
        ranks.broadcast(b"")


def follow(ranks: Ranks, answer: Answer) -> None:
    """Computes what rank 0 answers, until it ends."""
    while request := ranks.broadcast(b""):
        answer(request)
