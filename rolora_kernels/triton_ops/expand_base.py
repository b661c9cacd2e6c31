"""Y = scaling · S Bᵀ + X Wᵀ + bias in one pass over Y: the LoRA path is the accumulator's first k-step.

    X [M, K], W [N, K] of any strides, S [M, r], B [N, r], bias [N], Y [M, N]
    bytes beyond the frozen matmul: 2 M r + 2 N r once per tile; no read-modify-write of Y
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.base_tma import base_tma
from rolora_kernels.triton_ops.blocks import INTERPRETED, dot, put, rounded, tile
from rolora_kernels.triton_ops.launch import config_for, rank_block


@triton.jit
def expand_base_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, y_ptr, M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_sr,
    stride_bn, stride_br, stride_ym, stride_yn, scaling,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, UPCAST: tl.constexpr,
):
    pid_m, pid_n = tl.swizzle2d(
        tl.program_id(0) // tl.cdiv(N, BLOCK_N), tl.program_id(0) % tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N),
        GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R)
        b_s = tile(s_ptr, rows, ranks, M, R, stride_sm, stride_sr)
        b_b = rounded(tile(b_ptr, ranks, outputs, R, N, stride_br, stride_bn), x_ptr.dtype.element_ty, UPCAST)
        acc = dot(b_s, b_b, acc, UPCAST)
    acc *= scaling  # in fp32, before anything is rounded
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        b_x = tile(x_ptr, rows, columns, M, K, stride_xm, stride_xk)
        b_w = tile(w_ptr, columns, outputs, K, N, stride_wk, stride_wn)
        acc = dot(b_x, b_w, acc, UPCAST)
    if BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    put(y_ptr, acc, rows, outputs, M, N, stride_ym, stride_yn, UPCAST)


def expand_base(x: Tensor, W: Tensor, S: Tensor, B: Tensor, scaling: float, bias: Tensor | None, tma: bool = False) -> Tensor:
    """`x [M, K]`, `W [N, K]`, `S [M, r]`, `bias [N]` in one dtype, `B [N, r]` in it or fp32 → `[M, N]`; `tma` takes the persistent
    kernel, which raises ValueError where it cannot run."""
    (M, K), (N, R) = x.shape, B.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if tma and M:
        base_tma(x, W, S, B, scaling, bias, y, forward=True)
    elif M:
        config = config_for("expand_base", x, min(32, rank_block(R)), (M, N, K))
        grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
        expand_base_kernel[grid](
            x, W, S, B, y if bias is None else bias.contiguous(), y, M, N, K, R, *x.stride(), *W.stride(), *S.stride(), *B.stride(),
            *y.stride(), scaling, BIAS=bias is not None, UPCAST=INTERPRETED, **config.arguments())
    return y
