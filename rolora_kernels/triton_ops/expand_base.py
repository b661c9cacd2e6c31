"""Y = scaling · S Bᵀ + X Wᵀ + bias in one pass over Y.

X [M, K], W [N, K] of any strides, S [M, r], B [N, r], bias [N], Y [M, N].
Bytes beyond the frozen matmul: 2 M r + 2 N r once per tile, and no read-modify-write of Y.

A program owns one tile of Y. Its accumulator starts with the LoRA path, a few steps over the ranks;
the steps over K, which are the frozen matmul, are added to that. C clients: B [C, N, r], and a tile
belongs to one of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.base_tma import base_tma
from rolora_kernels.triton_ops.blocks import at_client, dot, flushed, put, rounded, tile
from rolora_kernels.triton_ops.launch import cdiv, client_axis, config_for, launch
from rolora_kernels.triton_ops.spec import GEMM_GRID, Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def expand_base_kernel(
    # X [M, K]
    x_ptr,
    stride_xm,
    stride_xk,
    # W [N, K]
    w_ptr,
    stride_wn,
    stride_wk,
    # S [M, R]
    s_ptr,
    stride_sm,
    stride_sr,
    # B [N, R]; a client's own lies stride_bc after the one before
    b_ptr,
    stride_bc,
    stride_bn,
    stride_br,
    # bias [N], contiguous
    bias_ptr,
    # Y [M, N]
    y_ptr,
    stride_ym,
    stride_yn,
    scaling,
    # sizes; M counts the rows of one client
    M,
    N,
    K,
    R,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    client = tl.program_id(1)
    x_ptr = at_client(x_ptr, client, M, stride_xm)
    s_ptr = at_client(s_ptr, client, M, stride_sm)
    b_ptr = at_client(b_ptr, client, 1, stride_bc)
    y_ptr = at_client(y_ptr, client, M, stride_ym)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    number = tl.program_id(0)
    # GROUP_M rows of tiles together, so that programs side by side share W from L2
    pid_m, pid_n = tl.swizzle2d(number // tiles_n, number % tiles_n, tiles_m, tiles_n, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R)
        b_s = tile(s_ptr, rows, ranks, M, R, stride_sm, stride_sr)
        b_b = tile(b_ptr, ranks, outputs, R, N, stride_br, stride_bn)
        acc = dot(b_s, rounded(b_b, x_ptr.dtype.element_ty, UPCAST), acc, UPCAST)
    acc *= scaling  # in fp32, before anything is rounded
    total = acc
    if x_ptr.dtype.element_ty == tl.float32:
        acc = tl.zeros_like(acc)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        b_x = tile(x_ptr, rows, columns, M, K, stride_xm, stride_xk)
        b_w = tile(w_ptr, columns, outputs, K, N, stride_wk, stride_wn)
        acc = dot(b_x, b_w, acc, UPCAST)
        if x_ptr.dtype.element_ty == tl.float32:
            total, acc = flushed(total, acc, k + BLOCK_K)
    if x_ptr.dtype.element_ty == tl.float32:
        acc += total
    if BIAS:
        b_bias = tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0)
        acc += b_bias.to(tl.float32)[None, :]
    put(y_ptr, acc, rows, outputs, M, N, stride_ym, stride_yn, UPCAST)


SPEC = Spec(
    kernel=expand_base_kernel,
    configs={
        2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        # twice the accumulators of a long sum (blocks.flushed): 64 rows spill in Triton 3.6
        4: Config(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=2),
    },
    by_rank={4: {32: {"BLOCK_R": 16}}},
    specimens={
        "expand_base": Specimen(
            switches={"BIAS": True},
            types={"b_ptr": "*fp32"},
            unit_strides=("stride_xk", "stride_wk", "stride_sr", "stride_br", "stride_yn"),
        )
    },
    sizes="MNK",
    rank_blocks=(16, 32),  # it walks over more ranks in steps of 32
    walks_ranks=True,
    primitives=("expand_base",),
    grid=GEMM_GRID,
    call=lambda ops, t, dropout, **which: [
        ops.expand_base(t["x"], t["W"], t["S"], t["B"], 1.3, None, **which)
    ],
    traffic=lambda M, N, K, r: 2 * (M * K + N * K + M * N + M * r) + 4 * N * r,
)


def expand_base(
    x: Tensor,
    W: Tensor,
    S: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None,
    tma: bool = False,
) -> Tensor:
    """`x [M, K]`, `W [N, K]`, `S [M, r]`, `bias [N]` in one dtype, `B [N, r]` or `[C, N, r]` in it
    or fp32 → `[M, N]`; `tma` takes the persistent kernel, which raises ValueError where it cannot
    run.
    """
    (M, K), (N, R) = x.shape, B.shape[-2:]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if tma and M:
        base_tma(x, W, S, B, scaling, bias, y, forward=True)
    elif M:
        config = config_for(SPEC, x, R, (M, N, K))
        clients, m, stride = client_axis(B, M)
        grid = (cdiv(m, config.BLOCK_M) * cdiv(N, config.BLOCK_N), clients)
        launch(
            SPEC,
            config,
            grid,
            x,
            *x.stride(),
            W,
            *W.stride(),
            S,
            *S.stride(),
            B,
            stride,
            *B.stride()[-2:],
            y if bias is None else bias.contiguous(),
            y,
            *y.stride(),
            scaling,
            m,
            N,
            K,
            R,
            BIAS=bias is not None,
        )
    return y
