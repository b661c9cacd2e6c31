"""What TMA can read: operands as the descriptors of base_tma want them, rows of a multiple of 16
bytes with a contiguous last axis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """None where a TMA kernel can compute on rows of `sizes` elements, else the reason why not."""
    if dtype.itemsize != 2:
        return f"{dtype} is not a 16-bit type"
    if any(size * dtype.itemsize % 16 for size in sizes):
        given = " and ".join(str(size) for size in sizes)
        return f"TMA wants rows of a multiple of 16 bytes, got {given} elements of {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"TMA needs compute capability 9.0, {torch.cuda.get_device_name(device)} has less"
    return None


def addressable(P: Tensor, W: Tensor, N: int, K: int, forward: bool) -> tuple[Tensor, bool]:
    """(W, or its transpose, as TMA can read it; whether it lies as [N, K]); ValueError where TMA
    cannot.
    """
    reason, transposed = why_not(P.device, P.dtype, N, K), forward
    if reason is None and not _suits(W):
        W, transposed = W.t(), not transposed  # a Conv1D's weight is a transposed view
        if not _suits(W):
            reason = f"a weight of strides {list(W.stride())} has no contiguous axis"
    if reason is not None:
        raise ValueError(f"a TMA kernel is forced, but cannot run: {reason}")
    return W, transposed


def _suits(matrix: Tensor) -> bool:
    """Whether TMA can read a matrix as it lies."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def suited(matrix: Tensor) -> Tensor:
    if _suits(matrix):
        return matrix
    return _padded(matrix, matrix.dtype).copy_(matrix)


def scaled(R: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · R in `dtype`, as TMA can read it: one launch, or none."""
    if R.dtype == dtype and scale == 1.0:
        return suited(R)
    return torch.mul(R, scale, out=_padded(R, dtype))


def _padded(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty, of the shape of `like`, in rows of a multiple of 16 bytes."""
    rows, columns = like.shape
    return torch.empty(rows, -(-columns // 8) * 8, dtype=dtype, device=like.device)[:, :columns]
