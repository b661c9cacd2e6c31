"""Multiple choice with a causal LM: trained on the right answer, judged by length-normalised
log-likelihood.

The choice with the largest log p(choice | prompt) / bytes(choice) is taken, as
lm-evaluation-harness's acc_norm does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rolora.config import Task
from rolora.data import cells
from rolora.data.files import Column, numbered
from rolora.data.stored import column
from rolora.errors import BadInput
from rolora.recipes import Batch
from rolora.recipes.causal_lm import CausalLM, Completion
from rolora.recipes.padding import by_length
from rolora.recipes.spans import token_losses

# Where a benchmark's rows say which set they are from; no column of a user's.
SET = "\0set"


@dataclass(frozen=True)
class Question:
    """One completion for every choice, the bytes of each, the index of the right one, and the set
    it is from, if several.
    """

    choices: list[Completion]
    lengths: list[int]
    answer: int
    task: str | None = None


class MultipleChoice:
    """`read(row) → (prompt, choices, index of the answer)` is the data set's own format; see
    `columns`.
    """

    peft_task_type = "CAUSAL_LM"
    headline = "accuracy"
    labels = None

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        return task.choices_column is not None

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        return False

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        prompt = None if task.prompt_template else task.prompt_column or "prompt"
        return {
            "--prompt-column": Column(prompt, cells.text),
            "--choices-column": Column(task.choices_column or "choices", cells.choices),
            "--label-column": Column(task.label_column, lambda value: value),
        }

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> MultipleChoice:
        read = columns(
            task.prompt_column or "prompt",
            task.choices_column or "choices",
            task.label_column,
            task.prompt_template,
        )
        return cls(tokenizer, task.max_length, read, device)

    def __init__(
        self,
        tokenizer,
        max_length: int,
        read: Callable[[dict], tuple[str, list[str], int]],
        device: torch.device | str = "cpu",
    ):
        self.lm = CausalLM(tokenizer, max_length, response_column="", device=device)
        self.read = read

    def encode(self, rows: Sequence[dict]) -> list[Any]:
        questions = []
        for number, row in numbered(rows):
            try:
                prompt, choices, answer = self.read(row)
                texts = [choice if choice[:1].isspace() else " " + choice for choice in choices]
                completions = [self.lm.complete(prompt, text) for text in texts]
                if any(completion.measure().lacks for completion in completions):
                    raise ValueError("a choice has no token to predict")
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise BadInput(f"row {number} is no multiple-choice question: {error}") from None
            if len(choices) < 2 or not 0 <= answer < len(choices):
                raise BadInput(
                    f"row {number}: answer {answer} of {len(choices)} choices; expected two "
                    "choices or more and "
                    "an answer among them"
                )
            questions.append(
                Question(
                    completions,
                    [len(text.encode()) for text in texts],
                    answer,
                    row.get(SET),
                )
            )
        return questions

    def skew_labels(self, examples: Sequence[Question]) -> list[int] | np.ndarray:
        return column(examples, "answer")

    def collate(self, examples: Sequence[Question]) -> Batch:
        return self.lm.collate([question.choices[question.answer] for question in examples])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.lm.loss(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.lm.losses(model, batch)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, examples: Sequence[Any], batch_size: int
    ) -> dict[str, float]:
        flat = [(number, c) for number, q in enumerate(examples) for c in range(len(q.choices))]
        scores: dict[tuple[int, int], tuple[float, float]] = {}
        for indices in by_length([len(examples[n].choices[c].ids) for n, c in flat], batch_size):
            batch = self.lm.collate([examples[flat[i][0]].choices[flat[i][1]] for i in indices])
            losses = token_losses(model, batch)
            counts = (batch.labels[:, 1:] != -100).sum(1)
            for i, loss, count in zip(
                indices, losses.sum(1).tolist(), counts.tolist(), strict=True
            ):
                scores[flat[i]] = loss, loss / count
        right = plain = 0
        loss, by_task = 0.0, dict[str, list[bool]]()
        for number, question in enumerate(examples):
            negatives = [scores[number, c][0] for c in range(len(question.choices))]
            normalised = [n / length for n, length in zip(negatives, question.lengths, strict=True)]
            hit = min(range(len(normalised)), key=normalised.__getitem__) == question.answer
            right += hit
            if question.task is not None:
                by_task.setdefault(f"accuracy/{question.task}", []).append(hit)
            plain += min(range(len(negatives)), key=negatives.__getitem__) == question.answer
            loss += scores[number, question.answer][1]
        count = len(examples)
        return {
            "accuracy": right / count,
            "accuracy_unnormalised": plain / count,
            "loss": loss / count,
            **{name: sum(hits) / len(hits) for name, hits in by_task.items()},
        }


def columns(
    prompt_column: str, choices_column: str, label_column: str, template: str | None = None
):
    """A `read` for rows with a prompt, a list of choices (or JSON text of one) and the answer's
    index or text.
    """

    fill = cells.template(template) if template else None

    def read(row: dict) -> tuple[str, list[str], int]:
        prompt = fill(row) if fill else cells.text(row[prompt_column])
        choices = cells.choices(row[choices_column])
        return prompt, choices, cells.answer(row[label_column], choices)

    return read


RECIPE = MultipleChoice
