"""Several examples in one row of a batch, none of which sees another.

A row is no longer than the longest example, so that attention costs no more than in a padded batch.
Positions start anew at every example, which is what transformers makes a block-diagonal mask from;
what fills a row up is one more example, without loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rolora.errors import BadInput
from rolora.recipes import Batch
from rolora.recipes.padding import IGNORED
from rolora.recipes.spans import Span, sent


def rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which examples each row has: the longest first, each in the first row that has room."""
    width = max(lengths)
    found: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            found.append([index])
            room.append(width - lengths[index])
        else:
            found[place].append(index)
            room[place] -= lengths[index]
    return found


def packed_batch(
    ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]], pad: int, device
) -> Batch:
    """The examples of a `token_batch` in fewer rows: the same loss, weight, examples and tokens.

    A row is not an example any more, so `losses` of such a batch are those of rows.
    """
    chosen = rows([len(own) for own in ids])
    inputs = laid_out([[ids[i] for i in row] for row in chosen], pad, "cpu")
    labels = torch.full(inputs["input_ids"].shape, IGNORED)
    for row, own in enumerate(chosen):
        begun = 0
        for index in own:
            for start, end in spans[index]:
                start = max(start, 1)  # nothing predicts an example's first token
                labels[row, begun + start : begun + end] = torch.tensor(ids[index][start:end])
            begun += len(ids[index])
    return sent(inputs, labels, len(ids), sum(map(len, ids)), device)


def laid_out(packed: Sequence[Sequence[Sequence[int]]], pad: int, device) -> dict[str, Tensor]:
    """`input_ids` and `position_ids` `[rows, width]` of rows of sequences, filled up to the longest
    row.
    """
    width = max(sum(map(len, row)) for row in packed)
    ids, positions = [], []
    for row in packed:
        filled = [*row, [pad] * (width - sum(map(len, row)))]
        ids.append([token for own in filled for token in own])
        positions.append([place for own in filled for place in range(len(own))])
    return {
        "input_ids": torch.tensor(ids, device=device),
        "position_ids": torch.tensor(positions, device=device),
    }


@torch.no_grad()
def require_apart(model: nn.Module) -> None:
    """Raises BadInput for a model in which packed examples see each other.

    Three forwards of a few tokens tell: what comes second must not change with what comes first,
    and must be what it is alone.
    """
    parameter = next(model.parameters())
    device = parameter.device
    first, other, second = [1, 2, 3, 4], [4, 3, 2, 5], [3, 5, 1, 2, 4]

    def logits(*sequences: list[int]) -> Tensor:
        found = model(**laid_out([sequences], 0, device)).logits[0]
        return found[-len(second) :].float()

    packed, changed, alone = logits(first, second), logits(other, second), logits(second)
    scale, eps = alone.abs().max(), torch.finfo(parameter.dtype).eps
    if (packed - changed).abs().max() > 4 * eps * scale:
        raise BadInput("--packing: in this model packed examples see each other: leave it out")
    if (packed - alone).abs().max() > eps**0.5 * scale:
        raise BadInput(
            "--packing: this model counts positions through packed examples: leave it out"
        )
