"""Which engine trains the clients of this process, and how many at a time.

The choice comes from a short measurement on the job itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor, nn

from rolora.adapter.call import MixesExamples
from rolora.cohort.batched import Batched, CannotBatch, why_not
from rolora.cohort.sequential import Cohort, Order, Sequential
from rolora.federated.client import LocalTrainer
from rolora.federated.layout import fingerprint
from rolora.federated.wire import Task

_WORTH = (
    1.1  # batched must be so many times as fast: a draw goes to the engine that needs less memory
)
_MEASURED = 8  # clients


@dataclass(frozen=True)
class Engine:
    """The engine, how many clients it trains at a time, and why, in words."""

    name: str
    chunk: int
    reason: str


def choose(
    wanted: str,
    chunk: int | None,
    trainer: LocalTrainer,
    heads: list[str],
    phase: str,
    lr: float,
    cohort: int,
) -> Engine:
    """Resolves "auto" and a chunk that was not given.

    Raises CannotBatch where "batched" is wanted and cannot be. The model's factors are as before
    afterwards.
    """
    if wanted == "sequential":
        return Engine("sequential", 1, "as asked")
    reason = why_not(trainer, heads)
    if reason is not None:
        if wanted == "batched":
            raise CannotBatch(reason)
        return Engine("sequential", 1, reason)
    kinds = tuple(trainer.layout.sizes)
    before = trainer.layout.gather(trainer.model, kinds)
    once = replace(trainer, config=replace(trainer.config, steps=1, epochs=None, accumulation=1))
    orders = _orders(once, before, phase, lr, min(cohort, _MEASURED, len(trainer.partition)))
    try:
        list(Batched(once, heads, 2).train(orders[:2]))
        if chunk is None:
            chunk = _fits(once, heads, orders, cohort)
        if wanted == "batched":
            return Engine("batched", chunk, f"as asked, {chunk} of {cohort} clients at a time")
        if min(chunk, len(orders)) < 2:
            return Engine("sequential", 1, "no two clients fit together")
        gain = _gain(once, heads, orders[:chunk])
    except MixesExamples as error:
        if wanted == "batched":
            raise CannotBatch(str(error)) from None
        return Engine("sequential", 1, str(error))
    finally:
        trainer.layout.scatter(trainer.model, before)
    if gain < _WORTH:
        return Engine(
            "sequential",
            1,
            f"measured: {min(chunk, len(orders))} clients together are {gain:.2f} × as fast",
        )
    return Engine(
        "batched",
        chunk,
        f"measured: {gain:.2f} × sequential, {chunk} of {cohort} clients at a time",
    )


def _orders(
    trainer: LocalTrainer, published: dict[str, Tensor], phase: str, lr: float, count: int
) -> list[Order]:
    prints = {kind: fingerprint(flat) for kind, flat in published.items()}
    tasks = [
        Task("measure", 0, phase, client, trainer.layout.hash, {}, prints, "bf16", lr, {}, {})
        for client in range(count)
    ]
    return [(task, published, {}) for task in tasks]


def _gain(trainer: LocalTrainer, heads: list[str], orders: list[Order]) -> float:
    """How many times as fast the batched engine takes one step of these clients.

    Median of interleaved pairs.
    """

    def seconds(engine: Cohort) -> float:
        start = time.perf_counter()
        for _ in engine.train(orders):
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    engines = Sequential(trainer), Batched(trainer, heads, len(orders))
    pairs = [(seconds(engines[0]), seconds(engines[1])) for _ in range(4)]
    return statistics.median(alone / together for alone, together in pairs[1:])


def _fits(trainer: LocalTrainer, heads: list[str], orders: list[Order], cohort: int) -> int:
    """How many clients fit into half of the free memory, from what one and two of them take."""

    def needs(count: int) -> int:
        return _peak(
            trainer.model, lambda: list(Batched(trainer, heads, count).train(orders[:count]))
        )

    needs(1)  # what is made once
    first, second = needs(1), needs(min(2, len(orders)))
    each = max(second - first, first // 4, 1)
    device = next(trainer.model.parameters()).device
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    return max(1, min(cohort, int((free / 2 - first) // each) + 1))


def _peak(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a step takes.

    On a GPU the allocator's peak, on a CPU four times what autograd keeps and the factors' states
    (the backward pass, gradients and moments beside).
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return 4 * sum(kept.values())


__all__ = ["CannotBatch", "Engine", "choose"]
