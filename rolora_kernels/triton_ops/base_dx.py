"""dX = drop(T A) + Σ_g dY_g W_g in one pass over dX per linear.

dY [M, N], W [N, K] of any strides, T [M, R] (the group's), A [R, K], dX [M, K].
Bytes beyond the frozen matmuls: 2 M R + 2 R K once per tile; the second and later linears of a
group read dX again.

A program owns one tile of dX, TILE_K columns of it. Its accumulator starts with the LoRA path,
masked, a few steps over the ranks; for a later linear of the group it starts with dX as it is. Then
it walks down N, STEP_N at a time: the frozen matmul. C clients: A [C, R, K], and a tile belongs to
one of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.base_tma import base_tma
from rolora_kernels.triton_ops.blocks import at_client, dot, flushed, keep, put, rounded, tile
from rolora_kernels.triton_ops.launch import (
    cdiv,
    client_axis,
    config_for,
    dropout_arguments,
    launch,
)
from rolora_kernels.triton_ops.spec import GEMM_GRID, Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def base_dx_kernel(
    # dY [M, N]
    dy_ptr,
    stride_ym,
    stride_yn,
    # W [N, K]
    w_ptr,
    stride_wn,
    stride_wk,
    # T [M, R]
    t_ptr,
    stride_tm,
    stride_tr,
    # A [R, K]; a client's own lies stride_ac after the one before
    a_ptr,
    stride_ac,
    stride_ar,
    stride_ak,
    # dX [M, K]
    dx_ptr,
    stride_xm,
    stride_xk,
    # dropout: the key as blocks.keep reads it
    key_ptr,
    last_dropped,
    scale,
    # sizes; M counts the rows of one client
    M,
    N,
    K,
    R,
    FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE_K: tl.constexpr,
    STEP_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    client, clients = tl.program_id(1), tl.num_programs(1)
    dy_ptr = at_client(dy_ptr, client, M, stride_ym)
    t_ptr = at_client(t_ptr, client, M, stride_tm)
    a_ptr = at_client(a_ptr, client, 1, stride_ac)
    dx_ptr = at_client(dx_ptr, client, M, stride_xm)
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, TILE_K)
    number = tl.program_id(0)
    # GROUP_M rows of tiles together, so that programs side by side share W from L2
    pid_m, pid_k = tl.swizzle2d(number // tiles_k, number % tiles_k, tiles_m, tiles_k, GROUP_M)
    row, column = pid_m * BLOCK_M, pid_k * TILE_K
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, TILE_K)
    acc = tl.zeros((BLOCK_M, TILE_K), tl.float32)
    if FIRST:
        for r in range(0, R, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            b_t = tile(t_ptr, rows, ranks, M, R, stride_tm, stride_tr)
            b_a = tile(a_ptr, ranks, columns, R, K, stride_ar, stride_ak)
            acc = dot(b_t, rounded(b_a, dy_ptr.dtype.element_ty, UPCAST), acc, UPCAST)
        if DROPOUT:
            kept = keep(
                key_ptr, last_dropped, rows, M, client, clients, column, PER_ROW, BLOCK_M, TILE_K
            )
            acc = tl.where(kept, acc * scale, 0.0)
    else:
        acc += tile(dx_ptr, rows, columns, M, K, stride_xm, stride_xk).to(tl.float32)
    total = tl.zeros_like(acc)
    for n in range(0, N, STEP_N):
        outputs = n + tl.arange(0, STEP_N)
        b_dy = tile(dy_ptr, rows, outputs, M, N, stride_ym, stride_yn)
        b_w = tile(w_ptr, outputs, columns, N, K, stride_wn, stride_wk)
        acc = dot(b_dy, b_w, acc, UPCAST)
        if dy_ptr.dtype.element_ty == tl.float32:
            total, acc = flushed(total, acc, n + STEP_N)
    if dy_ptr.dtype.element_ty == tl.float32:
        acc += total
    put(dx_ptr, acc, rows, columns, M, K, stride_xm, stride_xk, UPCAST)


SPEC = Spec(
    kernel=base_dx_kernel,
    configs={
        2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        4: Config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=2),
    },
    # A configuration, and so a table, names a matmul's blocks in the matmul's own letters: its
    # output is BLOCK_M × BLOCK_N, and it steps by BLOCK_K. Here the output's columns lie along K,
    # and the steps walk down N.
    renamed={"BLOCK_N": "TILE_K", "BLOCK_K": "STEP_N"},
    specimens={
        "base_dx": Specimen(
            switches={"FIRST": True, "DROPOUT": True, "PER_ROW": False},
            types={"a_ptr": "*fp32"},
            unit_strides=("stride_yn", "stride_wk", "stride_tr", "stride_ak", "stride_xk"),
        )
    },
    sizes="MNK",
    rank_blocks=(16, 32),  # it walks over more ranks in steps of 32
    walks_ranks=True,
    primitives=("base_dx",),
    grid=GEMM_GRID,
    call=lambda ops, t, dropout, **which: [
        ops.base_dx([t["dy"]], [t["W"]], t["T"], t["A"], dropout, **which)
    ],
    traffic=lambda M, N, K, r: 2 * (M * N + N * K + M * K + M * r) + 4 * r * K,
)


def base_dx(
    dys: list[Tensor],
    weights: list[Tensor],
    T: Tensor,
    A: Tensor,
    dropout: Dropout | None = None,
    tma: bool = False,
) -> Tensor:
    """`dys` of `[M, N_g]`, `weights` of `[N_g, K]`, `T [M, R]` in one dtype, `A [R, K]` or `[C, R,
    K]` in it or fp32 → `[M, K]`; `tma` takes the persistent kernel, which raises ValueError where
    it cannot run.
    """
    M, (R, K) = dys[0].shape[0], A.shape[-2:]
    dx = torch.empty(M, K, dtype=dys[0].dtype, device=A.device)
    key, last_dropped, scale, switches = dropout_arguments(dropout, dx)
    if tma and M:
        for number, (dy, W) in enumerate(zip(dys, weights, strict=True)):
            base_tma(
                dy,
                W,
                T,
                A,
                scale,
                None,
                dx,
                forward=False,
                first=number == 0,
                dropout=(key, last_dropped) if dropout is not None else None,
            )
    elif M:
        config = config_for(
            SPEC, dx, R, (M, max(dy.shape[1] for dy in dys), K), dropout=dropout is not None
        )
        clients, m, stride = client_axis(A, M)
        grid = (cdiv(m, config.BLOCK_M) * cdiv(K, config.BLOCK_N), clients)
        for number, (dy, W) in enumerate(zip(dys, weights, strict=True)):
            launch(
                SPEC,
                config,
                grid,
                dy,
                *dy.stride(),
                W,
                *W.stride(),
                T,
                *T.stride(),
                A,
                stride,
                *A.stride()[-2:],
                dx,
                *dx.stride(),
                key,
                last_dropped,
                scale,
                m,
                dy.shape[1],
                K,
                R,
                FIRST=number == 0,
                **switches,
            )
    return dx
