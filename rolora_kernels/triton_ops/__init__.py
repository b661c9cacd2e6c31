"""The five primitives as Triton kernels, one file each: the same functions, shapes and roundings as
torch_ops.
"""

import torch
from torch import Tensor

from rolora_kernels.triton_ops.base_dx import base_dx
from rolora_kernels.triton_ops.expand_base import expand_base
from rolora_kernels.triton_ops.grad_A import grad_A
from rolora_kernels.triton_ops.grads_of_dy import grads_of_dy
from rolora_kernels.triton_ops.launch import can_run
from rolora_kernels.triton_ops.shrink import shrink

__all__ = [
    "base_dx",
    "can_run",
    "expand_base",
    "factor",
    "grad_A",
    "grads_of_dy",
    "rank_buffer",
    "shrink",
]


def rank_buffer(like: Tensor, rank: int) -> Tensor:
    """An empty [M, rank] for T."""
    return torch.empty(like.shape[0], rank, dtype=like.dtype, device=like.device)


def factor(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor as the kernels take it: as it is, because they round it as they load it."""
    return A
