"""Batches of unequal lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rolora_kernels.transfer import to_device


def pad_right(sequences: Sequence[Sequence[int]], fill: int, device) -> tuple[Tensor, Tensor]:
    """(`[n, longest]` filled with `fill` on the right, its attention mask), int64."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return to_device(ids, device), to_device(mask, device)


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Index batches of similar lengths, longest first: little padding, and a lack of memory shows
    at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))
