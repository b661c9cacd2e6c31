"""Pairs of answers of which one is preferred: direct preference optimisation (Rafailov et al.,
NeurIPS 2023).

With π the model and ρ the reference, which is the same base with the LoRA path switched off, the
reward of an answer y to a prompt x is r(y) = β log(π(y|x) / ρ(y|x)), and the loss of a pair with
margin m = r(chosen) − r(rejected)

    −(1 − ε) log σ(m) − ε log σ(−m)

where ε is the share of pairs taken to be the wrong way round ("conservative" DPO, Mitchell 2023).

The reference is the model as it was downloaded: not in it are the factors of --init-adapter, nor
what a method has added to the base in earlier rounds (FLoRA, FedEx). No second model is in memory,
and every batch goes through the base once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.adapter.attach import adapted_layers
from rolora.adapter.familiar import disable_adapter
from rolora.config import Task
from rolora.data import preferences
from rolora.data.conversations import Continuation, Conversation
from rolora.data.files import Column, numbered
from rolora.errors import BadInput
from rolora.recipes import Batch, Measure
from rolora.recipes.joined import joined, opening_tokens
from rolora.recipes.padding import by_length
from rolora.recipes.rendering import Renderer
from rolora.recipes.spans import Marked, cut, token_batch, token_losses


@dataclass(frozen=True)
class Pair:
    """Two sequences with one prompt; what is said after it is compared."""

    chosen: Marked
    rejected: Marked

    def measure(self) -> Measure:
        """Of the longer answer, with its prompt."""
        longer = max(self.chosen, self.rejected, key=lambda answer: answer.whole).measure()
        lacks = self.chosen.lacks or self.rejected.lacks
        if lacks is None and self.chosen.ids == self.rejected.ids:
            lacks = "chosen and rejected are the same up to --max-length"
        return Measure(longer.tokens, longer.cut, lacks)


class PreferenceTuning:
    """`beta`: how much a log ratio counts; `smoothing`: the share of pairs taken to be the wrong
    way round, 0 to 0.5. Both answers are cut at their end.
    """

    peft_task_type = "CAUSAL_LM"
    headline = "reward_accuracy"
    labels = None
    sequences = 2  # that the model is handed for an example: chosen, rejected

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        return task.dpo_beta is not None or task.dpo_label_smoothing is not None

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        return preferences.is_preference(row)

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        return {}  # checked where a row is read

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> PreferenceTuning:
        return cls(
            tokenizer,
            task.max_length,
            0.1 if task.dpo_beta is None else task.dpo_beta,
            task.dpo_label_smoothing or 0.0,
            task.chat_template,
            device,
        )

    def __init__(
        self,
        tokenizer,
        max_length: int,
        beta: float = 0.1,
        smoothing: float = 0.0,
        template: str | None = None,
        device: torch.device | str = "cpu",
    ):
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self.beta, self.smoothing = beta, smoothing
        self.renderer, self.opening = Renderer(tokenizer, template), opening_tokens(tokenizer)

    def describe(self) -> dict[str, str]:
        how = f"DPO, β {self.beta:g}, label smoothing {self.smoothing:g}"
        return {
            "chat template": self.renderer.describe(),
            "preference": f"{how}, against the base without its LoRA path",
        }

    def beside(self) -> dict[str, str]:
        return self.renderer.beside()

    def encode(self, rows: Sequence[dict]) -> list[Pair]:
        if not preferences.is_preference(rows[0]):
            raise BadInput(
                "a pair's columns are chosen and rejected, and prompt where they do not begin with "
                f"it; there are {', '.join(map(str, rows[0]))}"
            )
        pairs = []
        for number, row in numbered(rows):
            try:
                found = preferences.read(row)
                pairs.append(Pair(self._marked(found.chosen), self._marked(found.rejected)))
            except ValueError as error:
                raise BadInput(f"row {number}: {error}") from None
        return pairs

    def _marked(self, answer: Continuation | Conversation) -> Marked:
        if isinstance(answer, Continuation):
            before, after = joined(self.tokenizer, self.opening, answer.prompt, answer.completion)
            whole = before + after
            return cut(whole, [(len(before), len(whole))], self.max_length, "an answer is empty")
        ids, spans = self.renderer.turns(answer, last=False)
        return cut(ids, spans, self.max_length, "an answer has no turn of the assistant's")

    def skew_labels(self, examples: Sequence[Pair]) -> None:
        return None

    def collate(self, examples: Sequence[Pair]) -> Batch:
        """Chosen, rejected, chosen, rejected, …; the loss is normalised by pairs."""
        sequences = [answer for pair in examples for answer in (pair.chosen, pair.rejected)]
        ids, spans = [s.ids for s in sequences], [s.spans for s in sequences]
        answers = token_batch(ids, spans, self.tokenizer.pad_token_id, self.device)
        return replace(answers, weight=len(examples), examples=len(examples))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses(model, batch).sum()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        chosen, rejected = self.rewards(model, batch)
        return self._pair_losses(chosen - rejected)

    def rewards(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """β log(π / ρ) of the chosen and of the rejected answers, fp32 `[pairs]` each."""
        policy = token_losses(model, batch).sum(1)
        with torch.no_grad(), _base_alone(model):
            reference = token_losses(model, batch).sum(1)
        rewards = self.beta * (reference - policy)  # both are −log p
        return rewards[0::2], rewards[1::2]

    def _pair_losses(self, margins: Tensor) -> Tensor:
        right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
        return -(1 - self.smoothing) * right - self.smoothing * wrong

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, examples: Sequence[Pair], batch_size: int
    ) -> dict[str, float]:
        """`reward_accuracy`: the share of pairs whose chosen answer has the larger reward."""
        found: list[tuple[Tensor, Tensor]] = []
        lengths = [max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in examples]
        for indices in by_length(lengths, batch_size):
            found.append(self.rewards(model, self.collate([examples[i] for i in indices])))
        chosen, rejected = (torch.cat(part).double() for part in zip(*found, strict=True))
        margins = chosen - rejected
        return {
            "reward_accuracy": (margins > 0).double().mean().item(),
            "reward_margin": margins.mean().item(),
            "chosen_reward": chosen.mean().item(),
            "rejected_reward": rejected.mean().item(),
            "loss": self._pair_losses(margins).mean().item(),
        }


def _base_alone(model: nn.Module) -> AbstractContextManager[None]:
    """The model without its LoRA path; a bare model is its own reference."""
    adapted = any(True for _ in adapted_layers(model))
    return disable_adapter(model) if adapted else nullcontext()


RECIPE = PreferenceTuning
