"""The five primitives on vendor libraries (cuBLAS, oneDNN, MKL) through PyTorch: any device, any dtype, always legal.

Shapes: x [M, K], W [N, K] of any strides, A [r, K], B [N, r], S and T [M, r], y and dy [M, N]. r may be the sum of the
ranks of several linears that share x. Every scaling happens in the accumulator (`alpha` of addmm), never on a rounded
operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolora_kernels import dropout as _dropout
from rolora_kernels.dropout import Dropout

_CHUNK_BYTES = 8 << 20  # fp32 copies of 16-bit rows are made this much at a time


def shrink(x: Tensor, A: Tensor, dropout: Dropout | None = None) -> Tensor:
    """S = drop(x) Aᵀ in x's dtype."""
    if dropout is None:
        return x @ A.t()
    S = x.new_empty(x.shape[0], A.shape[0])
    return S.addmm_(_dropout.zero_dropped(x, dropout), A.t(), beta=0, alpha=dropout.scale)


def expand_base(x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ + bias + scaling · S Bᵀ: the vendor GEMM, then one read-modify-write of y."""
    y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    return y.addmm_(S, B.t(), alpha=scaling)


def grads_of_dy(
    dy: Tensor, B: Tensor | None, S: Tensor | None, scaling: float, T: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """T = scaling · dy B (in dy's dtype, into `T` where given) and dB = scaling · dyᵀ S (fp32 [N, r]).

    `B is None` skips T, `S is None` skips dB.
    """
    if B is not None:
        T = dy.new_empty(dy.shape[0], B.shape[1]) if T is None else T
        T.addmm_(dy, B, beta=0, alpha=scaling)
    dB = _accumulate(S, dy, scaling).t().contiguous() if S is not None else None
    return (T if B is not None else None), dB


def base_dx(
    dys: list[Tensor], weights: list[Tensor], T: Tensor | None, A: Tensor | None, dropout: Dropout | None = None
) -> Tensor:
    """dx = Σ_g dy_g W_g + drop(T A), accumulated in place over the linears of a group."""
    dx = torch.mm(dys[0], weights[0])
    for dy, W in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, W)
    if T is None:
        return dx
    if dropout is None:
        return dx.addmm_(T, A)
    return dx.add_(_dropout.zero_dropped(T @ A, dropout), alpha=dropout.scale)


def grad_A(T: Tensor, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """dA = Tᵀ drop(x), fp32 [r, K]."""
    if dropout is None:
        return _accumulate(T, x, 1.0)
    return _accumulate(T, _dropout.zero_dropped(x, dropout), dropout.scale)


def _accumulate(narrow: Tensor, wide: Tensor, scaling: float) -> Tensor:
    """scaling · narrowᵀ wide as fp32 [r, wide columns], from an fp32 accumulator (fp64 stays fp64)."""
    if wide.dtype in (torch.float32, torch.float64):
        return torch.mm(narrow.t(), wide).mul_(scaling)
    if wide.is_cuda:
        return torch.mm(narrow.t(), wide, out_dtype=torch.float32).mul_(scaling)
    # oneDNN has no 16-bit GEMM with an fp32 result here: raise a few rows at a time, never the whole of dy or x.
    out = torch.zeros(narrow.shape[1], wide.shape[1], dtype=torch.float32, device=wide.device)
    step = wide.shape[0] if torch.compiler.is_compiling() else max(1, _CHUNK_BYTES // (4 * wide.shape[1]))
    for start in range(0, wide.shape[0], max(1, step)):
        rows = slice(start, start + step)
        out.addmm_(narrow[rows].float().t(), wide[rows].float(), alpha=scaling)
    return out
