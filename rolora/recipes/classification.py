"""Text classification: one text or a pair, one label, cross-entropy on the sequence head,
accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.config import Task
from rolora.data import cells
from rolora.data.files import Column, numbered
from rolora.data.stored import column
from rolora.errors import BadInput
from rolora.recipes import Batch
from rolora.recipes.padding import by_length, pad_right
from rolora_kernels.transfer import to_device

# Where a benchmark's rows say which part of the evaluation data they are; no column of a user's.
PART = "\0part"


@dataclass(frozen=True)
class Labelled:
    ids: list[int]
    label: int
    part: str | None = None  # of the evaluation data, where it is counted apart
    types: list[int] | None = None  # which of two texts each token is of, where the model knows


class Classification:
    """`labels` is the ordered set of classes; their positions are the head's outputs.

    `positive` names the class that F1 is of, where it is wanted. Rows with a `part` are counted
    apart from the rest, whose accuracy is the headline.
    """

    peft_task_type = "SEQ_CLS"
    headline = "accuracy"

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        return False

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        return task.label_column in row

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        return {
            "--text-column": Column(task.text_column, cells.text),
            "--text-pair-column": Column(task.text_pair_column, cells.text),
            "--label-column": Column(task.label_column, cells.label),
        }

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> Classification:
        return cls(
            tokenizer,
            labels or label_set(rows, task.label_column),
            task.max_length,
            task.text_column,
            task.label_column,
            task.text_pair_column,
            device,
        )

    def __init__(
        self,
        tokenizer,
        labels: Sequence[str],
        max_length: int,
        text_column: str,
        label_column: str,
        text_pair_column: str | None = None,
        device: torch.device | str = "cpu",
        positive: str | None = None,
    ):
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self.labels = list(labels)
        if len(self.labels) < 2:
            raise BadInput(
                f"column {label_column!r} holds only the label {self.labels[0]!r}: two classes or "
                "more are needed"
            )
        self.text_column, self.text_pair_column, self.label_column = (
            text_column,
            text_pair_column,
            label_column,
        )
        self.positive = None if positive is None else self.labels.index(positive)
        self._index = {label: i for i, label in enumerate(self.labels)}

    def encode(self, rows: Sequence[dict]) -> list[Labelled]:
        texts = [row[self.text_column] for row in rows]
        pairs = None
        if self.text_pair_column:
            pairs = [row[self.text_pair_column] for row in rows]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        ids = encoded["input_ids"]
        # Which text a token is of, for models that tell two apart; else nothing.
        parts = encoded.get("token_type_ids") if pairs else None
        examples = []
        for place, (number, row) in enumerate(numbered(rows)):
            tokens = ids[place]
            if not tokens:
                raise BadInput(f"row {number}: its text has no tokens: remove the row")
            label = cells.label(row[self.label_column])
            if label not in self._index:
                raise BadInput(
                    f"label {label!r} (row {number}) does not occur in the training data, "
                    "which has "
                    f"{', '.join(self.labels[:8])}: remove the row or add training examples of it"
                )
            own = None if parts is None else parts[place]
            examples.append(Labelled(tokens, self._index[label], row.get(PART), own))
        return examples

    def skew_labels(self, examples: Sequence[Labelled]) -> list[int] | np.ndarray:
        return column(examples, "label")

    def collate(self, examples: Sequence[Labelled]) -> Batch:
        ids, mask = pad_right([e.ids for e in examples], self.tokenizer.pad_token_id, self.device)
        labels = to_device(torch.tensor([e.label for e in examples]), self.device)
        tokens = sum(len(e.ids) for e in examples)
        inputs = {"input_ids": ids, "attention_mask": mask}
        types = [example.types for example in examples if example.types is not None]
        if types:
            inputs["token_type_ids"], _ = pad_right(types, 0, self.device)
        return Batch(inputs, labels, len(examples), len(examples), tokens)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(**batch.inputs).logits.float(), batch.labels, reduction="sum")

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(**batch.inputs).logits.float(), batch.labels, reduction="none")

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, examples: Sequence[Labelled], batch_size: int
    ) -> dict[str, float]:
        loss, guesses = 0.0, [0] * len(examples)
        for indices in by_length([len(e.ids) for e in examples], batch_size):
            batch = self.collate([examples[i] for i in indices])
            logits = model(**batch.inputs).logits.float()
            for i, guess in zip(indices, logits.argmax(-1).tolist(), strict=True):
                guesses[i] = guess
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        hits: dict[str, list[bool]] = {}
        for guess, example in zip(guesses, examples, strict=True):
            hits.setdefault(f"accuracy/{example.part}" if example.part else "accuracy", []).append(
                guess == example.label
            )
        metrics = {name: sum(found) / len(found) for name, found in sorted(hits.items())}
        if self.positive is not None:
            metrics["f1"] = self._f1(guesses, [e.label for e in examples])
        return metrics | {"loss": loss / len(examples)}

    def _f1(self, guesses: Sequence[int], labels: Sequence[int]) -> float:
        both = sum(g == t == self.positive for g, t in zip(guesses, labels, strict=True))
        either = sum(g == self.positive for g in guesses) + sum(t == self.positive for t in labels)
        return 2 * both / either if either else 0.0


def label_set(rows: Sequence[dict], column: str) -> list[str]:
    """The distinct labels, numbers in numeric order."""
    found = {cells.label(row[column]) for row in rows}
    if all(map(cells.is_whole, found)):
        return sorted(found, key=int)
    return sorted(found)


RECIPE = Classification
