"""What frozen blocks below the first adapted one make of a sequence, kept across steps and runs.

An adapter in the last blocks of a model leaves what is below them as it was, so a sequence that
was seen comes out of them as before: training then runs only the blocks above. A row's result is
computed from that row alone, so it does not depend on which batch asked first, and runs stay the
same in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from rolora.adapter.model import adapted_layers

_MOST = 3 << 30  # bytes, after which the memory begins anew


class Memory:
    """Rows `[length, width]` of hidden states by what went in, for one frozen stack of blocks."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Tensor] = {}
        self.bytes = 0

    def recall(
        self, blocks: list[Callable[..., Tensor]], hidden: Tensor, mask: Tensor | None, own: dict
    ) -> Tensor:
        """What `blocks` make of `hidden` `[batch, length, width]`, in its dtype."""
        found = []
        for place, row in enumerate(hidden):
            masked = None if mask is None else mask[place % len(mask)]
            key = _key(row, masked)
            if key not in self.rows:
                self._keep(key, _through(blocks, row, masked, own))
            found.append(self.rows[key])
        return torch.stack(found)

    def _keep(self, key: bytes, row: Tensor) -> None:
        if self.bytes > _MOST:
            self.rows.clear()
            self.bytes = 0
        self.rows[key] = row
        self.bytes += row.nbytes


def install(model: nn.Module, memory: Memory) -> int:
    """Lets the blocks of `model` below the first adapted one be recalled; how many they are.

    `memory` must be of the same base weights; the blocks must be in evaluation mode, and take
    hidden states first and a mask second or by name, as those of transformers' models do.
    """
    name, blocks = max(
        ((name, module) for name, module in model.named_modules() if _are_blocks(module)),
        key=lambda found: len(found[1]),
    )
    below = min(
        int(layer.removeprefix(f"{name}.").partition(".")[0])
        for layer, _ in adapted_layers(model)
        if layer.startswith(f"{name}.")
    )
    frozen = [block.forward for block in blocks[:below]]

    def recalled(
        hidden: Tensor | None = None, mask: Tensor | None = None, *_: Any, **own: Any
    ) -> Tensor:
        hidden = own.pop("hidden_states") if hidden is None else hidden
        mask = own.pop("attention_mask", mask)
        assert not blocks[0].training, "dropout below would not come out as before"
        assert own.get("past_key_values") is None, "a cache would take rows for one text"
        assert _for_all_rows(own), "what a row's blocks are told must be the same for all rows"
        with torch.no_grad():
            return memory.recall(frozen, hidden, mask, own)

    def passed(hidden: Tensor | None = None, *_: Any, **own: Any) -> Tensor:
        return own["hidden_states"] if hidden is None else hidden

    for place, block in enumerate(blocks[:below]):
        block.forward = passed if place else recalled
    return below


def _are_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _for_all_rows(own: dict[str, Any]) -> bool:
    """Whether the tensors that blocks are given, positions and their like, have one row."""
    flat = [v for value in own.values() for v in (value if isinstance(value, tuple) else (value,))]
    return all(len(value) == 1 for value in flat if isinstance(value, Tensor) and value.dim())


def _key(row: Tensor, mask: Tensor | None) -> bytes:
    made = blake2b(digest_size=16)
    for value in (row, mask):
        if value is not None:
            made.update(str(tuple(value.shape)).encode())
            made.update(value.contiguous().view(torch.uint8).numpy().data)
    return made.digest()


def _through(
    blocks: list[Callable[..., Tensor]], row: Tensor, mask: Tensor | None, own: dict
) -> Tensor:
    hidden = row.unsqueeze(0)
    masked = None if mask is None else mask.unsqueeze(0)
    for block in blocks:
        hidden = block(hidden, attention_mask=masked, **own)
    return hidden[0]
