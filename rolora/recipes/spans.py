"""Token sequences of which spans carry loss: batches, losses and metrics of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.recipes import Batch, Measure, long_vocabulary
from rolora.recipes.padding import IGNORED, by_length, pad_right
from rolora.recipes.scoring import token_scores
from rolora_kernels.transfer import to_device

Span = tuple[int, int]  # first token, and the one after the last


@dataclass(frozen=True)
class Marked:
    """Token ids and the spans that carry loss, cut to a length; `whole`: tokens before the cut.

    `lacks`: why there is nothing to learn from it, None where there is something.
    """

    ids: list[int]
    spans: tuple[Span, ...]
    whole: int
    lacks: str | None = None

    def measure(self) -> Measure:
        return Measure(self.whole, self.whole - len(self.ids), self.lacks)


def cut(ids: list[int], spans: Sequence[Span], most: int, lacking: str) -> Marked:
    """The first `most` tokens, and what of the spans lies in them.

    `lacking`: what is said where there are no spans to begin with.
    """
    kept = tuple((start, min(end, most)) for start, end in spans if start < most and end > 1)
    lacks = None
    if not any(end > start for start, end in spans):
        lacks = lacking
    elif not any(end > max(start, 1) for start, end in kept):
        lacks = "its answer is cut away by --max-length"
    return Marked(ids[:most], kept, len(ids), lacks)


def token_batch(
    ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]], pad: int, device
) -> Batch:
    """A batch of one sequence an example, padded on the right, whose labels are IGNORED outside
    spans and whose loss is normalised by the tokens that carry it.
    """
    padded, mask = pad_right(ids, pad, "cpu")
    carries = torch.zeros_like(mask, dtype=torch.bool)
    for row, own in enumerate(spans):
        for start, end in own:
            carries[row, start:end] = True
    labels = padded.masked_fill(~carries, IGNORED)
    inputs = {"input_ids": padded, "attention_mask": mask}
    return sent(inputs, labels, len(ids), sum(map(len, ids)), device)


def sent(inputs: dict[str, Tensor], labels: Tensor, examples: int, tokens: int, device) -> Batch:
    """A batch on `device` from what was made of it on the host, where what carries loss is counted
    and found.
    """
    carried = (labels[:, 1:] != IGNORED).flatten().nonzero().squeeze(1)
    there = {name: to_device(value, device) for name, value in inputs.items()}
    places = to_device(carried, device)
    return Batch(there, to_device(labels, device), len(carried), examples, tokens, places)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of every token that carries loss, 0 elsewhere: fp32 `[examples, length − 1]`."""
    if long_vocabulary.applies(model):
        return long_vocabulary.token_losses(model, batch, IGNORED)
    logits, labels = model(**batch.inputs).logits[:, :-1].float(), batch.labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


@torch.no_grad()
def metrics(
    model: nn.Module,
    examples: Sequence[Any],
    batch_size: int,
    collate: Callable[[Sequence[Any]], Batch],
) -> dict[str, float]:
    """Loss and perplexity of the tokens that carry loss, how many of them are the likeliest, and
    the share of examples of which all are.

    Greedy decoding gives the reference exactly when every one of its tokens is the arg max after
    those before it, so exact match needs no generation.
    """
    loss, weight, exact, right = 0.0, 0, 0, 0
    for indices in by_length([len(e.ids) for e in examples], batch_size):
        batch = collate([examples[i] for i in indices])
        losses, hits = token_scores(model, batch, IGNORED)
        carried = batch.labels[:, 1:] != IGNORED
        loss += losses.sum().item()
        weight += batch.weight
        right += int(hits.sum())
        exact += int((hits.sum(1) == carried.sum(1)).sum())
    mean = loss / max(weight, 1)
    return {
        "exact_match": exact / len(examples),
        "token_accuracy": right / max(weight, 1),
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
    }
