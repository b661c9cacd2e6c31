"""What recipes share whose examples are one sequence of tokens: batches, padded or packed, and the
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rolora.recipes import Batch
from rolora.recipes.packing import packed_batch
from rolora.recipes.spans import token_batch, token_losses


class OnTokens:
    """An example has token ids (`ids`) and the spans of them that carry loss (`spans`). A recipe
    with `packing` puts several of them in a row of a batch to train on.
    """

    peft_task_type = "CAUSAL_LM"
    labels: list[str] | None = None
    tokenizer: Any
    device: torch.device | str
    packing = False

    def skew_labels(self, examples: Sequence[Any]) -> None:
        return None

    def collate(self, examples: Sequence[Any]) -> Batch:
        if not self.packing:
            return self.padded(examples)
        ids, spans = [e.ids for e in examples], [e.spans for e in examples]
        return packed_batch(ids, spans, self.tokenizer.pad_token_id, self.device)

    def padded(self, examples: Sequence[Any]) -> Batch:
        """A row of the batch an example."""
        ids, spans = [e.ids for e in examples], [e.spans for e in examples]
        return token_batch(ids, spans, self.tokenizer.pad_token_id, self.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_losses(model, batch).sum()

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_losses(model, batch).sum(1)
