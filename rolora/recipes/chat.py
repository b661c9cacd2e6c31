"""Conversations by the tokenizer's chat template, loss on what the assistant says; perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rolora.config import Task
from rolora.data import conversations
from rolora.data.conversations import Continuation, Conversation
from rolora.data.files import Column, numbered
from rolora.errors import BadInput
from rolora.recipes.joined import joined, opening_tokens
from rolora.recipes.on_tokens import OnTokens
from rolora.recipes.rendering import Renderer
from rolora.recipes.spans import Marked, Span, cut, metrics


class Chat(OnTokens):
    """`loss_on`: "assistant" for all of its turns, "last" for its last one, "all" for every token.

    What is over `max_length` is cut at the end, so that a conversation keeps its beginning; the
    prompt of a `prompt` and `completion` carries loss with "all" alone.
    """

    headline = "loss"

    @classmethod
    def is_asked(cls, task: Task) -> bool:
        return task.loss_on is not None

    @classmethod
    def is_told(cls, task: Task, row: dict) -> bool:
        return conversations.format_of(row) is not None

    @classmethod
    def columns(cls, task: Task) -> dict[str, Column]:
        return {}  # a format's columns are checked where a row is read

    @classmethod
    def build(
        cls,
        task: Task,
        tokenizer,
        rows: Sequence[dict],
        device: torch.device,
        labels: list[str] | None = None,
    ) -> Chat:
        loss_on = task.loss_on or "assistant"
        return cls(tokenizer, task.max_length, loss_on, task.chat_template, device, task.packing)

    def __init__(
        self,
        tokenizer,
        max_length: int,
        loss_on: str = "assistant",
        template: str | None = None,
        device: torch.device | str = "cpu",
        packing: bool = False,
    ):
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self.packing = packing
        self.loss_on, self.renderer = loss_on, Renderer(tokenizer, template)
        self.opening = opening_tokens(tokenizer)

    def describe(self) -> dict[str, str]:
        where = {"assistant": "the assistant's turns", "last": "its last turn", "all": "all tokens"}
        return {"chat template": self.renderer.describe(), "loss on": where[self.loss_on]}

    def beside(self) -> dict[str, str]:
        return self.renderer.beside()

    def encode(self, rows: Sequence[dict]) -> list[Marked]:
        form = conversations.format_of(rows[0])
        if form is None:
            wanted = [" and ".join(columns) for columns in conversations.FORMATS.values()]
            raise BadInput(
                f"a conversation's columns are {', or '.join(wanted)}; there are "
                f"{', '.join(map(str, rows[0]))}"
            )
        examples = []
        for number, row in numbered(rows):
            try:
                found = conversations.read(row, form)
                examples.append(cut(*self._rendered(found), self.max_length, _lacking(found)))
            except ValueError as error:
                raise BadInput(f"row {number}: {error}") from None
        return examples

    def _rendered(self, found: Conversation | Continuation) -> tuple[list[int], list[Span]]:
        """All tokens, and the spans that carry loss."""
        if isinstance(found, Continuation):
            before, after = joined(self.tokenizer, self.opening, found.prompt, found.completion)
            ids, spans = before + after, [(len(before), len(before) + len(after))]
        elif self.loss_on == "all":
            ids, spans = self.renderer.whole(found), []
        else:
            ids, spans = self.renderer.turns(found, self.loss_on == "last")
        return ids, [(0, len(ids))] if self.loss_on == "all" else spans

    def evaluate(
        self, model: nn.Module, examples: Sequence[Marked], batch_size: int
    ) -> dict[str, float]:
        found = metrics(model, examples, batch_size, self.padded)
        return {name: found[name] for name in ("token_accuracy", "loss", "perplexity")}

    def halves(self, example: Marked) -> tuple[list[int], list[int]]:
        """(token ids up to what the assistant says last, what it says): of a conversation that
        carries loss all over, its first quarter and the rest.
        """
        if self.loss_on == "all":
            start = max(1, len(example.ids) // 4)
            return example.ids[:start], example.ids[start:]
        start, end = example.spans[-1]
        return example.ids[:start], example.ids[start:end]


def _lacking(found: Conversation | Continuation) -> str:
    """Why a row without a span of the assistant's has none."""
    if isinstance(found, Continuation):
        return "it has no tokens to learn"
    if not found.messages:
        return "it has no messages"
    return "it has no turn of the assistant's"


RECIPE = Chat
