"""How likely a causal LM finds each token, and whether it would have written it: for evaluation,
where nothing is kept for a backward pass.

The logits of a batch are `examples · length · vocabulary` numbers: 64 texts of 256 tokens over
150,000 entries are 10 GB in fp32. Over a long vocabulary they are made a chunk of tokens at a time,
where the output embedding is plain; else fewer examples are looked at together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rolora.recipes import Batch, long_vocabulary
from rolora_kernels import gemm

_AT_ONCE = 1 << 26  # logits: 256 MiB in fp32


@torch.no_grad()
def token_scores(model: nn.Module, batch: Batch, ignored: int) -> tuple[Tensor, Tensor]:
    """(−log p of every token that carries loss, else 0, fp32; whether each of those is the
    arg max) after the tokens before it: both `[examples, length − 1]`.
    """
    if long_vocabulary.applies(model):
        return _by_chunks(model, batch, ignored)
    wanted = batch.labels[:, 1:]
    vocabulary = getattr(cast(Any, model).config.get_text_config(), "vocab_size", 1)
    together = max(1, _AT_ONCE // (vocabulary * batch.labels.shape[1]))
    losses, hits = [], []
    for start in range(0, len(wanted), together):
        own = slice(start, start + together)
        inputs = {name: value[own] for name, value in batch.inputs.items()}
        logits = model(**inputs).logits[:, :-1].float()
        losses.append(_losses(logits.flatten(0, 1), wanted[own].flatten(), ignored))
        hits.append((logits.argmax(-1) == wanted[own]).flatten())
    carried = wanted != ignored
    return torch.cat(losses).view_as(wanted), torch.cat(hits).view_as(wanted) & carried


def _by_chunks(model: nn.Module, batch: Batch, ignored: int) -> tuple[Tensor, Tensor]:
    states, weight = long_vocabulary.hidden_states(model, batch.inputs)
    wanted = batch.labels[:, 1:]
    carried = wanted != ignored
    chosen, labels = states[carried], wanted[carried]
    weight = weight.to(chosen.dtype)
    rows = max(1, _AT_ONCE // len(weight))
    losses = states.new_zeros(wanted.shape, dtype=torch.float32)
    hits = torch.zeros_like(carried)
    found, right = [], []
    for start in range(0, len(chosen), rows):
        own = slice(start, start + rows)
        logits = gemm.abt(chosen[own], weight).float()
        found.append(_losses(logits, labels[own], ignored))
        right.append(logits.argmax(-1) == labels[own])
    if found:
        losses[carried], hits[carried] = torch.cat(found), torch.cat(right)
    return losses, hits


def _losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")
