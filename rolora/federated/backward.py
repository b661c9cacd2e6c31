"""How the gradients of a micro-batch are made: a forward and a backward, operation by operation.
`cuda_graphs` is the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from rolora.adapter.masks import set_dropout_key
from rolora.recipes import Batch, Recipe


class Backward(Protocol):
    """Makes gradients of what trains, a micro-batch at a time; they add up until they are
    forgotten.
    """

    def begin(self) -> None:
        """Before a client's first step: its factors are in the model, and no gradients are."""

    def __call__(self, batch: Batch, weight: int, key: int | None) -> Tensor:
        """Adds the gradients of the batch's summed loss over `weight`; returns that loss, detached,
        fp32 `[]`. `key`: 64 bits, of the step's dropout masks; None without dropout.
        """

    def forget(self) -> None:
        """After an optimizer's step."""


class Plain:
    """Operation by operation."""

    def __init__(self, model: nn.Module, recipe: Recipe, parameters: Sequence[nn.Parameter]):
        self.model, self.recipe, self.parameters = model, recipe, parameters

    def begin(self) -> None:
        self.forget()

    def __call__(self, batch: Batch, weight: int, key: int | None) -> Tensor:
        if key is not None:
            set_dropout_key(self.model, key)
        loss = self.recipe.loss(self.model, batch)
        (loss / weight).backward()
        return loss.detach()

    def forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
