"""Batches of unequal lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rolora.recipes import Batch
from rolora_kernels.transfer import to_device

IGNORED = -100  # a label that carries no loss


def pad_right(sequences: Sequence[Sequence[int]], fill: int, device) -> tuple[Tensor, Tensor]:
    """(`[n, longest]` filled with `fill` on the right, its attention mask), int64."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return to_device(ids, device), to_device(mask, device)


@dataclass(frozen=True)
class Lengths:
    """Which lengths batches have: multiples of `multiple` tokens, and `longest`; `fill` is the
    token that they are padded with.
    """

    multiple: int
    longest: int
    fill: int

    def pad(self, batch: Batch) -> Batch:
        """The same examples, loss and weight in a batch of one of these lengths."""
        ids = batch.inputs["input_ids"]
        length = ids.shape[1]
        wanted = max(length, min(-(-length // self.multiple) * self.multiple, self.longest))
        if wanted == length:
            return batch
        more = wanted - length
        inputs = {n: F.pad(t, (0, more), value=self._fill(n)) for n, t in batch.inputs.items()}
        if "position_ids" in inputs:  # one more example, as what fills a packed row up always is
            inputs["position_ids"][:, length:] = torch.arange(more, device=ids.device)
        labels, carried = batch.labels, batch.carried
        if labels.shape == ids.shape:
            labels = F.pad(labels, (0, more), value=IGNORED)
        if carried is not None:
            carried = carried + carried // (length - 1) * more
        return replace(batch, inputs=inputs, labels=labels, carried=carried)

    def _fill(self, name: str) -> int:
        return self.fill if name == "input_ids" else 0


def few(longest: int) -> int:
    """A multiple that has eight lengths at most up to `longest`, and fills tensor cores' tiles."""
    return -(-longest // 64) * 8


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Index batches of similar lengths, longest first: little padding, and a lack of memory shows
    at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[i : i + batch_size] for i in range(0, len(order), batch_size))
