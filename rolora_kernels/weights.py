"""Frozen base weights: what a linear's `W [out, in]` may be stored as.

The operation asks a weight for three things only: its shape, the device, and a dense `[out, in]` tensor in the compute
dtype for the length of one matmul. A quantised type implements `dequantise` and is never kept dense.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class FrozenWeight(Protocol):
    """A frozen `[out, in]` matrix in any storage."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that x must have outside autocast; None if any will do (quantised types)."""

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Dense `[out, in]` in `dtype`; written into `out` where given. Strides are free."""


class Dense:
    """A plain tensor `[out, in]` of any strides (GPT-2's Conv1D hands in a transposed view)."""

    def __init__(self, tensor: Tensor):
        if tensor.ndim != 2:
            raise ValueError(f"weight must be [out, in], got shape {list(tensor.shape)}")
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.tensor.to(dtype) if out is None else out.copy_(self.tensor)


def dense(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    """`weight` as a dense `[out, in]` tensor in `dtype`, no copy when it already is one."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantise(dtype)
