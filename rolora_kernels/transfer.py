"""Tensors from the host to a device, without the host waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, made on the CPU, on `device`. A GPU fetches it when its stream gets there: from
    pinned memory, which PyTorch does not hand out again before that.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
