"""A digest of a model's weights, which tells another base under the same name."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_weights(model: nn.Module) -> str:
    """SHA-256 over every parameter's and buffer's name, shape, dtype and the sum of its bits.

    The bits of a value are read as an integer and summed modulo 2**64: one pass over the weights,
    the same on every device and for every number of threads. One changed value always tells; values
    that trade places within a tensor do not.
    """
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)} {_sum(value)}\n".encode())
    return found.hexdigest()


def _sum(value: Tensor) -> int:
    """The sum of a tensor's bits, as integers of its own width, modulo 2**64."""
    if value.is_complex():
        value = torch.view_as_real(value)
    flat = value.detach().contiguous().flatten()
    return int(flat.view(_BITS[flat.element_size()]).sum(dtype=torch.int64))
