"""Recipes: how rows of data become batches, a loss and metrics. One file for each kind of task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rolora.config import Task
from rolora.data.files import Column


@dataclass(frozen=True)
class Batch:
    """Tensors for the model, and what they count for.

    `weight` normalises the loss (tokens that carry loss for causal LM, examples otherwise);
    `tokens` are not padding. `carried`: int64, the places of `labels[:, 1:]`, counted row by row,
    that carry loss, where they were found on the host: who looks for them on a GPU waits for it.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weight: int
    examples: int
    tokens: int
    carried: Tensor | None = None


@dataclass(frozen=True)
class Measure:
    """What `--max-length` left of an example: its `tokens` before, how many of them were cut, and
    why there is nothing to learn from it (None where there is something).
    """

    tokens: int
    cut: int
    lacks: str | None


class Recipe(Protocol):
    """A kind of task: how it is told from the data, and what training and evaluation ask of it.

    An example that can be cut has a method `measure() -> Measure`: the plan then counts what is
    cut, and one without anything to learn from is dropped or refused. A recipe that hands the
    model more than one sequence an example says how many as `sequences`; one that has more to say
    in the plan has `describe() -> {name: text}`, and one that writes files beside the adapter has
    `beside() -> {file: text}`.

    The file `rolora/recipes/<task type>.py` exports its recipe as `RECIPE`; `--task-type` and
    `config.TASK_TYPES` know it by that name.
    """

    @property
    def peft_task_type(self) -> str:
        """What PEFT's files call it; a class attribute."""

    @property
    def headline(self) -> str:
        """The metric that a table shows first, without --metric; `metrics.py` says which way is
        better.
        """

    @property
    def labels(self) -> list[str] | None:
        """Classes, in the order of the head's outputs; None without a head."""

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        """Whether options are given that only this kind of task has."""

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        """Whether the columns (the keys of `row`) are this kind's."""

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        """Flag → the column that it names, of those that every row must have."""

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> Recipe:
        """The recipe as the options describe it, for `rows` to learn from or to be judged by.

        `labels`: the classes where they are known; else those of the rows.
        """

    def encode(self, rows: Sequence[dict]) -> list[Any]:
        """Rows → examples (token ids and labels); raises BadInput for a row that does not fit."""

    def skew_labels(self, examples: Sequence[Any]) -> Sequence | np.ndarray | None:
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
