"""Many clients in one forward and backward on one base.

The frozen matmuls and the common factor are shared, the rest is batched. In a round that trains B,
A is every client's: one shrink serves all their tokens, and only S B_cᵀ is a client's own; in a
round that trains A it is the other way round. Examples are grouped by client, as many for each,
padded to the longest; losses, clipping, optimizer state and steps are each client's own, so that a
client's update is that of the sequential cohort up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import nn

from rolora.adapter.model import adapted_layers
from rolora.adapter.parameter import RoLoRAParameter
from rolora.cohort.sequential import Order, Result, Sequential
from rolora.cohort.together import Together
from rolora.federated.client import LocalTrainer

_MIXING = ("moe", "experts", "router")


class CannotBatch(Exception):
    """This model's clients cannot be trained together; the text says why."""


def why_not(trainer: LocalTrainer, heads: Iterable[str]) -> str | None:
    """None where clients of this trainer can be trained together, else why not, by name."""
    model, config = trainer.model, trainer.config
    if getattr(trainer.recipe, "packing", False):
        return "rows of --packing are several examples, and a cohort's are told apart by rows"
    if config.kept:
        return "every client holds factors of its own"
    if config.client_ranks is not None and not config.selects:
        return "clients train different ranks"
    adapted = dict(adapted_layers(model))
    for path, layer in adapted.items():
        if isinstance(layer, RoLoRAParameter) and not layer.routed:
            return f"{path} is computed as W + Δ, which has no room for the factors of a cohort"
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} is a {kind}, which mixes examples"
        if regroups(module) and any(
            path.startswith(f"{name}.") and not isinstance(layer, RoLoRAParameter)
            for path, layer in adapted.items()
        ):
            return (
                f"{name} is a {kind}, which regroups tokens of several clients, "
                "and adapted layers lie inside it"
            )
    for head in heads:
        for name, module in model.get_submodule(head).named_modules():
            if (
                any(True for _ in module.parameters(recurse=False))
                and type(module) is not nn.Linear
            ):
                return (
                    f"the head's {head}.{name} is a {type(module).__name__}; "
                    "only linear layers have a client axis"
                )
    return None


def regroups(module: nn.Module) -> bool:
    """Whether a module is a mixture of experts: by its name, where no attention lies inside, as it
    does in a whole model or block that is named for its mixtures.
    """
    kinds = [type(inner).__name__.lower() for inner in module.modules()]
    return any(word in kinds[0] for word in _MIXING) and not any("attention" in k for k in kinds)


class Batched:
    """Trains orders `chunk` at a time.

    A chunk that does not fit into memory is halved and trained again; `on_halved` is told.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        heads: Iterable[str],
        chunk: int,
        on_halved: Callable[[int], None] = lambda chunk: None,
    ):
        self.trainer, self.heads, self.chunk, self.on_halved = (
            trainer,
            tuple(heads),
            chunk,
            on_halved,
        )
        self.alone = Sequential(trainer)
        reason = why_not(trainer, self.heads)
        if reason is not None:
            raise CannotBatch(reason)

    def train(self, orders: Iterable[Order]) -> Iterator[Result]:
        """One result for every order, in their order."""
        orders = iter(orders)
        while waiting := list(islice(orders, self.chunk)):
            while waiting:
                try:
                    results = self._together(waiting[: self.chunk])
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not _is_lack_of_memory(error) or self.chunk == 1:
                        raise
                    self.chunk = max(1, self.chunk // 2)
                    self.on_halved(self.chunk)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                del waiting[: len(results)]
                yield from results

    def _together(self, orders: list[Order]) -> list[Result]:
        """A result for every order, in their order."""
        tasks = [task for task, _, _ in orders]
        if any(
            task.layout != self.trainer.layout.hash or task.fingerprints != tasks[0].fingerprints
            for task in tasks
        ):
            return list(
                self.alone.train(orders)
            )  # a client that holds something else: its own trainer says so
        with Together(
            self.trainer, self.heads, tasks, orders[0][1], [state for _, _, state in orders]
        ) as cohort:
            results = cohort.train()
        return [
            (task.client, result, state)
            for task, result, state in zip(tasks, results, cohort.states, strict=True)
        ]


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
