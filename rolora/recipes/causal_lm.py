"""Causal LM: a prompt and a response (or plain text), loss on the response only; perplexity and
exact match.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rolora.config import Task
from rolora.data import cells
from rolora.data.files import Column, numbered
from rolora.errors import BadInput
from rolora.recipes import Measure
from rolora.recipes.generating import continuations, overlap
from rolora.recipes.joined import joined, opening_tokens
from rolora.recipes.on_tokens import OnTokens
from rolora.recipes.spans import Span, metrics

_SHORT, _JUDGED = 8, 200  # tokens of a short answer; rows that are looked at
_LONGEST = 32  # tokens that are written where answers are short


@dataclass(frozen=True)
class Completion:
    """Token ids of prompt and response, and where the response (what carries loss) begins; how many
    tokens were cut away to make them fit.
    """

    ids: list[int]
    start: int
    cut: int = 0

    @property
    def spans(self) -> tuple[Span, ...]:
        return ((self.start, len(self.ids)),)

    def measure(self) -> Measure:
        lacks = "it has no tokens to learn" if self.start >= len(self.ids) else None
        return Measure(len(self.ids) + self.cut, self.cut, lacks)


class CausalLM(OnTokens):
    """`template`, where given, is filled from the row's columns (`{name}`) and makes the prompt.

    Without a prompt column or template every token but the first carries loss.
    """

    headline = "loss"  # an instance whose answers are short has exact_match

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        own = (task.response_column, task.prompt_column, task.prompt_template)
        return any(option is not None for option in own)

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        return task.text_column in row

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        return {
            "--prompt-column": Column(task.prompt_column, cells.text),
            "--response-column": Column(task.response_column or task.text_column, cells.text),
        }

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> CausalLM:
        recipe = cls(
            tokenizer,
            task.max_length,
            task.response_column or task.text_column,
            task.prompt_column,
            task.prompt_template,
            device,
            task.packing,
        )
        if recipe.has_prompt and recipe.answers_are_short(rows):
            recipe.headline = "exact_match"
        return recipe

    def __init__(
        self,
        tokenizer,
        max_length: int,
        response_column: str,
        prompt_column: str | None = None,
        template: str | None = None,
        device: torch.device | str = "cpu",
        packing: bool = False,
    ):
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self.packing = packing
        self.response_column, self.prompt_column = response_column, prompt_column
        self.fill = cells.template(template) if template else None
        self.has_prompt = bool(template or prompt_column)
        self.opening = opening_tokens(tokenizer) if tokenizer is not None else []

    def answers_are_short(self, rows: Sequence[dict]) -> bool:
        """Whether half of the first answers have eight tokens or fewer: a word, a name, a number.

        Only then does "all of it right" say anything of a model that is still learning.
        """
        texts = [row[self.response_column] for row in rows[:_JUDGED]]
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return statistics.median(len(ids) for ids in found) <= _SHORT

    def encode(self, rows: Sequence[dict]) -> list[Completion]:
        examples = []
        for number, row in numbered(rows):
            try:
                examples.append(self.complete(self._prompt(row), row[self.response_column]))
            except ValueError as error:
                raise BadInput(f"row {number}: {error}") from None
        return examples

    def complete(self, prompt: str, response: str) -> Completion:
        """Tokens of `prompt` with the tokenizer's opening tokens, then `response` and the end
        token.

        Too long: the prompt loses its beginning (not the opening token), then the response its end.
        """
        before, after = joined(self.tokenizer, self.opening, prompt, response)
        first, whole = len(self.opening), len(before) + len(after)
        after = after[: self.max_length - first]
        room = self.max_length - first - len(after)
        rest = before[first:][-room:] if room > 0 else []
        ids = self.opening + rest + after
        return Completion(ids, max(1, first + len(rest)), whole - len(ids))

    def evaluate(
        self, model: nn.Module, examples: Sequence[Completion], batch_size: int
    ) -> dict[str, float]:
        found = metrics(model, examples, batch_size, self.padded)
        if self.headline == "exact_match":
            found["f1"] = self._f1(model, examples, batch_size)
        return found

    def halves(self, example: Completion) -> tuple[list[int], list[int]]:
        """(token ids to continue, those that follow in the data): prompt and response, or a plain
        text's first quarter and its rest.
        """
        cut = example.start
        if not self.has_prompt:
            cut = max(cut, len(example.ids) // 4)
        return example.ids[:cut], example.ids[cut:]

    def _f1(self, model: nn.Module, examples: Sequence[Completion], batch_size: int) -> float:
        """Of the words that the model writes and those of the answers, the mean."""
        halves = [self.halves(example) for example in examples]
        room = min(_LONGEST, max(len(answer) for _, answer in halves) + 4)
        prompts = [prompt for prompt, _ in halves]
        texts = continuations(model, self.tokenizer, prompts, room, batch_size, self.device)
        answers = [self.tokenizer.decode(ids, skip_special_tokens=True) for _, ids in halves]
        return statistics.fmean(map(overlap, texts, answers))

    def _prompt(self, row: dict) -> str:
        if self.fill is not None:
            return self.fill(row)
        return row[self.prompt_column] if self.prompt_column else ""


RECIPE = CausalLM
