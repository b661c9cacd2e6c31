"""Recipes: how rows of data become batches, a loss and metrics. One file for each kind of task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Tensors for the model, and what they count for.

    `weight` normalises the loss (tokens that carry loss for causal LM, examples otherwise);
    `tokens` are not padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: int
    examples: int
    tokens: int


class Recipe(Protocol):
    """What training and evaluation ask of a kind of task; `headline` names the metric that a table
    shows first.
    """

    headline: str

    def encode(self, rows: Sequence[dict]) -> list[Any]:
        """Rows → examples (token ids and labels); raises BadInput for a row that does not fit."""

    def skew_labels(self, examples: Sequence[Any]) -> Sequence | None:
        """What a label-skewed partition splits by; None where the task has no labels."""

    def collate(self, examples: Sequence[Any]) -> Batch:
        """A padded batch on the model's device."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed, not averaged, loss in fp32 `[]`."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of every example, fp32 `[examples]`; their sum is `loss`."""

    def evaluate(
        self, model: nn.Module, examples: Sequence[Any], batch_size: int
    ) -> dict[str, float]:
        """Metrics over the examples, the mean loss among them."""
