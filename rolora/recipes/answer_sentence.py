"""Multiple choice by writing: the model is trained on "the correct answer is X", generates that
sentence, and X is parsed out.

As the commonsense benchmark of LLM-Adapters (Hu et al., EMNLP 2023) does, which is how the paper's
figures can lie below chance: what names no choice is wrong. Beside it the likelihoods: the choice
whose sentence has the largest log p a byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rolora.recipes.generating import continuations
from rolora.recipes.multiple_choice import MultipleChoice, Question

SENTENCE = "the correct answer is {}"


@dataclass(frozen=True)
class Written(Question):
    """A question, and the names of its choices."""

    names: tuple[str, ...] = ()


class AnswerSentence(MultipleChoice):
    """`read(row) → (prompt, names of the choices, index of the right one)`."""

    def __init__(
        self,
        tokenizer,
        max_length: int,
        read: Callable[[dict], tuple[str, list[str], int]],
        device: torch.device | str = "cpu",
    ):
        def sentences(row: dict) -> tuple[str, list[str], int]:
            prompt, names, answer = read(row)
            return prompt, [SENTENCE.format(name) for name in names], answer

        super().__init__(tokenizer, max_length, sentences, device)
        self.tokenizer, self.named = tokenizer, read

    def encode(self, rows: Sequence[dict]) -> list[Written]:
        return [
            Written(**vars(question), names=tuple(self.named(row)[1]))
            for question, row in zip(super().encode(rows), rows, strict=True)
        ]

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, examples: Sequence[Any], batch_size: int
    ) -> dict[str, float]:
        by_likelihood = super().evaluate(model, examples, batch_size)
        written, hits = self.write(model, examples, batch_size), dict[str, list[bool]]()
        named = 0
        for text, question in zip(written, examples, strict=True):
            choice = parse(text, question.names)
            named += choice is not None
            for key in ("accuracy", *([f"accuracy/{question.task}"] if question.task else ())):
                hits.setdefault(key, []).append(choice == question.answer)
        return {key: sum(values) / len(values) for key, values in hits.items()} | {
            "answered": named / len(examples),
            "loss": by_likelihood["loss"],
            **{
                key.replace("accuracy", "likelihood_accuracy", 1): value
                for key, value in by_likelihood.items()
                if key != "loss"
            },
        }

    def write(self, model: nn.Module, examples: Sequence[Written], batch_size: int) -> list[str]:
        """Greedy continuations of the prompts, of the length of the longest sentence and a little
        more.
        """
        room = max(len(c.ids) - c.start for q in examples for c in q.choices) + 4
        prompts = [question.choices[0].ids[: question.choices[0].start] for question in examples]
        return continuations(model, self.tokenizer, prompts, room, batch_size, self.lm.device)


def parse(text: str, names: Sequence[str]) -> int | None:
    """The choice that a text names first; None where it names none."""
    found = re.search("|".join(sorted(map(re.escape, names), key=len, reverse=True)), text)
    return list(names).index(found.group()) if found else None
