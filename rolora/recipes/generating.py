"""Texts that a causal LM writes, and how far they agree with a reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from rolora.recipes.padding import by_length


@runtime_checkable
class WritesText(Protocol):
    """A recipe whose examples are something to continue, and what follows it."""

    tokenizer: Any

    def halves(self, example: Any) -> tuple[list[int], list[int]]:
        """(token ids to continue, those that follow in the data)."""


_ARTICLES = re.compile(r"\b(a|an|the)\b")


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    room: int,
    batch_size: int,
    device: torch.device | str,
) -> list[str]:
    """What the model writes after each prompt (token ids), greedily: up to its end token, or `room`
    tokens, or the last of its positions.
    """
    texts = [""] * len(prompts)
    text = cast(Any, model).config.get_text_config()
    pad = tokenizer.pad_token_id
    for indices in by_length([len(ids) for ids in prompts], batch_size):
        longest = max(len(prompts[i]) for i in indices)
        padding = [longest - len(prompts[i]) for i in indices]
        ids = [[pad] * n + prompts[i] for n, i in zip(padding, indices, strict=True)]
        mask = [[0] * n + [1] * (longest - n) for n in padding]
        most = getattr(text, "max_position_embeddings", longest + room)
        out: torch.Tensor = cast(Any, model).generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(1, min(room, most - longest)),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
        for i, row in zip(indices, out[:, longest:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def overlap(text: str, reference: str) -> float:
    """F1 of the words of two short answers, without case, punctuation and articles (Rajpurkar et
    al., EMNLP 2016).
    """
    words, wanted = _words(text), _words(reference)
    shared = sum((Counter(words) & Counter(wanted)).values())
    if not words or not wanted:
        return float(words == wanted)
    return 2 * shared / (len(words) + len(wanted))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()
