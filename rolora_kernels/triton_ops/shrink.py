"""S = scale · drop(X) Aᵀ, one read of X for all the adapters that share it.

X [M, K], A [R, K] (the stacked A of up to a whole group), S [M, R] in X's dtype.
Bytes: 2 M K + 2 M R, and A once per row block from L2.
C clients: A [C, R, K], and a row block belongs to one of them.

Where the row blocks would leave two thirds of a device's multiprocessors without work (2,048 rows:
32 programs for 132), each is shared by several programs, which walk over a part of K. A second
launch adds what they find in a fixed order: 8 M R bytes a part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.blocks import at_client, dot, flushed, keep, put, rounded, tile
from rolora_kernels.triton_ops.launch import (
    cdiv,
    client_axis,
    config_for,
    dropout_arguments,
    launch,
    multiprocessors,
    splits_of,
)
from rolora_kernels.triton_ops.reduce import sum_partials
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def shrink_kernel(
    # X [M, K]
    x_ptr,
    stride_xm,
    stride_xk,
    # A [R, K]; a client's own lies stride_ac after the one before
    a_ptr,
    stride_ac,
    stride_ar,
    stride_ak,
    # S [M, R], or where SPLIT fp32 partials [splits, clients, M, R]
    s_ptr,
    stride_sm,
    stride_sr,
    # dropout: the key as blocks.keep reads it
    key_ptr,
    last_dropped,
    scale,
    # sizes; M counts the rows of one client
    M,
    K,
    R,
    # the part of K that is a program's, where SPLIT; a multiple of BLOCK_K
    part,
    DROPOUT: tl.constexpr,
    PER_ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    client, clients = tl.program_id(2), tl.num_programs(2)
    x_ptr = at_client(x_ptr, client, M, stride_xm)
    a_ptr = at_client(a_ptr, client, 1, stride_ac)
    s_ptr = at_client(s_ptr, client, M, stride_sm)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_block, first, end = tl.program_id(1), 0, K
    if SPLIT:
        rank_blocks = tl.cdiv(R, BLOCK_R)
        split, rank_block = rank_block // rank_blocks, rank_block % rank_blocks
        first, end = split * part, tl.minimum(split * part + part, K)
        s_ptr += split.to(tl.int64) * clients * M * stride_sm
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = tl.zeros_like(acc)
    for k in range(first, end, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        b_x = tile(x_ptr, rows, columns, M, K, stride_xm, stride_xk)
        if DROPOUT:
            kept = keep(
                key_ptr, last_dropped, rows, M, client, clients, k, PER_ROW, BLOCK_M, BLOCK_K
            )
            b_x = tl.where(kept, b_x, 0.0).to(b_x.dtype)
        b_a = tile(a_ptr, columns, ranks, K, R, stride_ak, stride_ar)
        acc = dot(b_x, rounded(b_a, x_ptr.dtype.element_ty, UPCAST), acc, UPCAST)
        if x_ptr.dtype.element_ty == tl.float32:
            total, acc = flushed(total, acc, k + BLOCK_K - first)
    if x_ptr.dtype.element_ty == tl.float32:
        acc += total
    put(s_ptr, acc * scale, rows, ranks, M, R, stride_sm, stride_sr, UPCAST)


SPEC = Spec(
    kernel=shrink_kernel,
    configs={
        2: Config(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
        4: Config(BLOCK_M=32, BLOCK_K=32, num_stages=2),
    },
    by_rank={2: {64: {"BLOCK_K": 64, "num_warps": 8}}},  # four spill on sm_80 where K is split
    masked={2: {"BLOCK_K": 64}},  # of twice the width a mask of keys by row spills
    specimens={
        "shrink": Specimen(
            switches={"DROPOUT": True, "PER_ROW": False, "SPLIT": False},
            types={"a_ptr": "*fp32"},
            unit_strides=("stride_xk", "stride_ak", "stride_sr"),
            fixed=("SPLIT",),
        ),
        "shrink_split": Specimen(
            switches={"DROPOUT": True, "PER_ROW": False, "SPLIT": True},
            types={"a_ptr": "*fp32", "s_ptr": "*fp32"},
            unit_strides=("stride_xk", "stride_ak", "stride_sr"),
            fixed=("SPLIT",),
        ),
    },
    sizes="MK",
    rank_blocks=(16, 32, 64),
    primitives=("shrink",),
    grid=tuple(
        {"BLOCK_M": m, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m in (32, 64, 128)
        for k in (128, 256)
        for warps, stages in ((4, 3), (4, 4), (8, 3))
    ),
    call=lambda ops, t, dropout: [ops.shrink(t["x"], t["A"], dropout)],
    traffic=lambda M, N, K, r: 2 * M * (K + r) + 4 * r * K,
)


def shrink(
    x: Tensor,
    A: Tensor,
    dropout: Dropout | None = None,
    scaling: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """scaling · drop(x) Aᵀ: `x [M, K]`, `A [R, K]` or `[C, R, K]` in x's dtype or fp32 (rounded as
    it is loaded) → `[M, R]`, into `out` where given. T = scaling · dY B is the same operation on dY
    and Bᵀ.
    """
    (M, K), R = x.shape, A.shape[-2]
    S = torch.empty(M, R, dtype=x.dtype, device=x.device) if out is None else out
    config = config_for(SPEC, x, R, (M, K), dropout=dropout is not None)
    if M:
        key, last_dropped, scale, switches = dropout_arguments(dropout, x)
        clients, m, stride = client_axis(A, M)
        blocks, rank_blocks = cdiv(m, config.BLOCK_M), cdiv(R, config.BLOCK_R)
        free = multiprocessors(x.device)
        splits, part = splits_of(blocks * rank_blocks * clients, K, config.BLOCK_K, free)
        found, scale = S, scale * scaling
        if splits > 1:
            found = torch.empty(splits * M, R, dtype=torch.float32, device=x.device)
        launch(
            SPEC,
            config,
            (blocks, rank_blocks * splits, clients),
            x,
            *x.stride(),
            A,
            stride,
            *A.stride()[-2:],
            found,
            *found.stride(),
            key,
            last_dropped,
            scale if splits == 1 else 1.0,
            m,
            K,
            R,
            part,
            SPLIT=splits > 1,
            **switches,
        )
        if splits > 1:
            sum_partials([(found.view(splits, M, R), S)], scale)
    return S
