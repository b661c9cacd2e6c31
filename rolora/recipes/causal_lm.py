"""Causal LM: a prompt and a response (or plain text), loss on the response only; perplexity and
exact match.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.config import Task
from rolora.data import cells
from rolora.data.files import Column, number_of
from rolora.errors import BadInput
from rolora.recipes import Batch, long_vocabulary
from rolora.recipes.generating import continuations, overlap
from rolora.recipes.padding import by_length, pad_right
from rolora.recipes.scoring import token_scores

IGNORED = -100
_SHORT, _JUDGED = 8, 200  # tokens of a short answer; rows that are looked at
_LONGEST = 32  # tokens that are written where answers are short


@dataclass(frozen=True)
class Completion:
    """Token ids of prompt and response, and where the response (what carries loss) begins."""

    ids: list[int]
    start: int

    @property
    def carries_loss(self) -> bool:
        return self.start < len(self.ids)


class CausalLM:
    """`template`, where given, is filled from the row's columns (`{name}`) and makes the prompt.

    Without a prompt column or template every token but the first carries loss.
    """

    peft_task_type = "CAUSAL_LM"
    headline = "loss"  # an instance whose answers are short has exact_match
    labels = None

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
    ):
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
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
        for place, row in enumerate(rows):
            try:
                examples.append(self.complete(self._prompt(row), row[self.response_column]))
            except ValueError as error:
                raise BadInput(f"row {number_of(row, place)}: {error}") from None
        if not any(example.carries_loss for example in examples):
            raise BadInput(
                f"no row has a token to predict: column {self.response_column!r} is empty "
                "throughout"
            )
        return examples

    def complete(self, prompt: str, response: str) -> Completion:
        """Tokens of `prompt` with the tokenizer's opening tokens, then `response` and the end
        token.

        Too long: the prompt loses its beginning (not the opening token), then the response its end.
        """
        opening, end = self.opening, self.tokenizer.eos_token_id
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        after = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        # A text that was made by a template may open and end by itself.
        if before[: len(opening)] == opening:
            before = before[len(opening) :]
        elif not before and after[: len(opening)] == opening:
            after = after[len(opening) :]
        if end is not None and after[-1:] != [end]:
            after = [*after, end]
        after = after[: self.max_length - len(opening)]
        room = self.max_length - len(opening) - len(after)
        before = before[-room:] if room > 0 else []
        ids = opening + before + after
        if not ids:
            raise ValueError("it has no tokens: remove the row")
        return Completion(ids, max(1, len(opening) + len(before)))

    def skew_labels(self, examples: Sequence[Completion]) -> None:
        return None

    def collate(self, examples: Sequence[Completion]) -> Batch:
        ids, mask = pad_right([e.ids for e in examples], self.tokenizer.pad_token_id, self.device)
        labels = ids.clone()
        for row, example in enumerate(examples):
            labels[row, : example.start] = IGNORED
            labels[row, len(example.ids) :] = IGNORED
        weight = int((labels[:, 1:] != IGNORED).sum())
        return Batch(
            {"input_ids": ids, "attention_mask": mask},
            labels,
            weight,
            len(examples),
            int(mask.sum()),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_losses(model, batch).sum()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_losses(model, batch).sum(1)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, examples: Sequence[Completion], batch_size: int
    ) -> dict[str, float]:
        """Greedy decoding gives the reference exactly when every one of its tokens is the arg max
        after those before it, so exact match needs no generation.
        """
        loss, weight, exact, right = 0.0, 0, 0, 0
        for indices in by_length([len(e.ids) for e in examples], batch_size):
            batch = self.collate([examples[i] for i in indices])
            losses, hits = token_scores(model, batch, IGNORED)
            carried = batch.labels[:, 1:] != IGNORED
            loss += losses.sum().item()
            weight += batch.weight
            right += int(hits.sum())
            exact += int((hits.sum(1) == carried.sum(1)).sum())
        mean = loss / max(weight, 1)
        found = {
            "exact_match": exact / len(examples),
            "token_accuracy": right / max(weight, 1),
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),
        }
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


def opening_tokens(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text."""
    whole, plain = (
        tokenizer("a")["input_ids"],
        tokenizer("a", add_special_tokens=False)["input_ids"],
    )
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every token that carries loss, 0 elsewhere: fp32 `[examples, length − 1]`."""
    if long_vocabulary.applies(model):
        return long_vocabulary.token_losses(model, batch.inputs, batch.labels, IGNORED)
    logits, labels = model(**batch.inputs).logits[:, :-1].float(), batch.labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


RECIPE = CausalLM
