"""dA = scale · Tᵀ drop(X) in one pass over X, for all the adapters that share it.

T [M, R], X [M, K], dA [R, K] fp32.
Bytes: 2 M K for X, 2 M R for T per column block, 8 R K M / ROWS for the partials.

A program owns ROWS × BLOCK_K of X and walks down the rows; ROWS are fewer where a device would
idle (launch.rows_of). What it finds is a partial sum; a second launch adds the partials in a fixed
order. C clients: a program's rows belong to one of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.blocks import at_client, dot, keep, put, tile
from rolora_kernels.triton_ops.launch import (
    cdiv,
    config_for,
    dropout_arguments,
    launch,
    multiprocessors,
    rows_of,
)
from rolora_kernels.triton_ops.reduce import sum_partials
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def grad_a_kernel(
    # T [M, R]
    t_ptr,
    stride_tm,
    stride_tr,
    # X [M, K]
    x_ptr,
    stride_xm,
    stride_xk,
    # dA's partials [M / ROWS, clients, R, K], contiguous: their sum is one for all clients
    da_ptr,
    # dropout: the key as blocks.keep reads it
    key_ptr,
    last_dropped,
    # sizes; M counts the rows of one client
    M,
    K,
    R,
    DROPOUT: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m = tl.program_id(0)
    rank_blocks = tl.cdiv(R, BLOCK_R)
    client, clients = tl.program_id(2) // rank_blocks, tl.num_programs(2) // rank_blocks
    x_ptr = at_client(x_ptr, client, M, stride_xm)
    t_ptr = at_client(t_ptr, client, M, stride_tm)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    ranks = (tl.program_id(2) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    first_row = pid_m * ROWS
    for row in range(first_row, tl.minimum(first_row + ROWS, M), BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        b_x = tile(x_ptr, rows, columns, M, K, stride_xm, stride_xk)
        if DROPOUT:
            kept = keep(
                key_ptr, last_dropped, rows, M, client, clients, first, PER_ROW, BLOCK_M, BLOCK_K
            )
            b_x = tl.where(kept, b_x, 0.0).to(b_x.dtype)
        b_t = tile(t_ptr, rows, ranks, M, R, stride_tm, stride_tr)
        acc = dot(tl.trans(b_x), b_t, acc, UPCAST)
    part = da_ptr + (pid_m.to(tl.int64) * clients + client) * R * K
    put(part, acc, columns, ranks, K, R, 1, K, UPCAST)


SPEC = Spec(
    kernel=grad_a_kernel,
    configs={
        2: Config(ROWS=1024, BLOCK_M=32, BLOCK_K=256, num_warps=8, num_stages=4),
        # 64 columns would become a TF32 tcgen05 on sm_100 in Triton 3.7.1, `ieee` or not; the AOT
        # table checks it.
        4: Config(ROWS=512, BLOCK_M=16, BLOCK_K=32, num_warps=8, num_stages=2),
    },
    specimens={
        "grad_A": Specimen(
            switches={"DROPOUT": True, "PER_ROW": False},
            types={"da_ptr": "*fp32"},
            unit_strides=("stride_tr", "stride_xk"),
        )
    },
    sizes="MK",
    rank_blocks=(16, 32, 64),
    primitives=("grad_A",),
    grid=tuple(
        {"ROWS": rows, "BLOCK_M": m, "BLOCK_K": k, "num_warps": 8, "num_stages": stages}
        for rows in (256, 512, 1024)
        for m in (32, 64)
        for k in (128, 256)
        for stages in (3, 4)
    ),
    call=lambda ops, t, dropout: [ops.grad_A(t["T"], t["x"], dropout)],
    traffic=lambda M, N, K, r: 2 * M * (K + r) + 4 * r * K,
)


def grad_A(T: Tensor, x: Tensor, dropout: Dropout | None = None, clients: int = 0) -> Tensor:
    """`T [M, R]`, `x [M, K]` in one dtype → fp32 `[R, K]`, or `[clients, R, K]`."""
    (M, K), R = x.shape, T.shape[1]
    count = clients or 1
    dA = torch.empty(*([clients] if clients else []), R, K, dtype=torch.float32, device=x.device)
    if M == 0:
        return dA.zero_()
    config = config_for(SPEC, x, R, (M, K), dropout=dropout is not None)
    key, last_dropped, scale, switches = dropout_arguments(dropout, x)
    blocks_k, others = cdiv(K, config.BLOCK_K), count * cdiv(R, config.BLOCK_R)
    rows = rows_of(config, M // count, blocks_k * others, multiprocessors(x.device))
    config, blocks = replace(config, ROWS=rows), cdiv(M // count, rows)
    parts = torch.empty(blocks, count * R, K, dtype=torch.float32, device=x.device)
    grid = (blocks, blocks_k, others)
    launch(
        SPEC,
        config,
        grid,
        T,
        *T.stride(),
        x,
        *x.stride(),
        parts,
        key,
        last_dropped,
        M // count,
        K,
        R,
        **switches,
    )
    sum_partials([(parts, dA.view(count * R, K))], scale)
    return dA
