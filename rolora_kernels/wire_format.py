"""What a flat buffer of values looks like on the wire: its dtype and its length."""

from __future__ import annotations

import torch
from torch import Tensor

WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.uint8}
BLOCK = 256  # values of an int8 scale


def blocks(values: int) -> int:
    """int8 blocks, and so scales, of so many values; the last block may be short."""
    return -(-values // BLOCK)


def wire_length(values: int, dtype: torch.dtype) -> int:
    """Elements of a wire buffer of `dtype` for so many values."""
    return values if dtype != torch.uint8 else values + 4 * blocks(values)


def values_in(wire: Tensor) -> int:
    """How many values a wire buffer holds; raises ValueError for an int8 buffer of an impossible
    length.
    """
    if wire.dtype != torch.uint8:
        return wire.numel()
    values = wire.numel() - 4 * -(-wire.numel() // (BLOCK + 4))
    if wire_length(values, torch.uint8) != wire.numel():
        raise ValueError(f"{wire.numel()} bytes are no int8 buffer of blocks of {BLOCK}")
    return values
