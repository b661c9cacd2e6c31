"""T = scaling · dY B and dB = scaling · dYᵀ S in one pass over dY.

dY [M, N], B [N, r], S [M, r], T [M, r] in dY's dtype, dB [N, r] fp32.
Bytes: 2 M N for dY, 8 r M N / BLOCK_N for T's partials, 8 r M N / ROWS for dB's (written and read).

A program owns ROWS × BLOCK_N of dY: it keeps dB's part in registers while it walks down the rows,
and writes T's part of each row block. Both parts are fp32 partials that a second launch sums in a
fixed order: no atomics. ROWS are fewer where a device would idle (launch.rows_of). C clients: B
[C, N, r], and a program's rows belong to one of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import at_client, dot, put, rounded, tile
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch, multiprocessors, rows_of
from rolora_kernels.triton_ops.reduce import sum_partials
from rolora_kernels.triton_ops.shrink import shrink
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def grads_of_dy_kernel(
    # dY [M, N]
    dy_ptr,
    stride_ym,
    stride_yn,
    # B [N, R]; a client's own lies stride_bc after the one before
    b_ptr,
    stride_bc,
    stride_bn,
    stride_br,
    # S [M, R]
    s_ptr,
    stride_sm,
    stride_sr,
    # T's partials [N / BLOCK_N, clients, M, R], contiguous
    t_ptr,
    # dB's partials [M / ROWS, clients, N, R], contiguous: their sum is one for all clients
    db_ptr,
    # sizes; M counts the rows of one client
    M,
    N,
    R,
    NEED_T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rank_blocks = tl.cdiv(R, BLOCK_R)
    client, clients = tl.program_id(2) // rank_blocks, tl.num_programs(2) // rank_blocks
    dy_ptr = at_client(dy_ptr, client, M, stride_ym)
    s_ptr = at_client(s_ptr, client, M, stride_sm)
    outputs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = (tl.program_id(2) % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_part = t_ptr + (pid_n.to(tl.int64) * clients + client) * M * R
    db_part = db_ptr + (pid_m.to(tl.int64) * clients + client) * N * R
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if NEED_T:
        b_ptr = at_client(b_ptr, client, 1, stride_bc)
        b_b = tile(b_ptr, outputs, ranks, N, R, stride_bn, stride_br)
        b_b = rounded(b_b, dy_ptr.dtype.element_ty, UPCAST)
    first_row = pid_m * ROWS
    for step in range(0, tl.minimum(ROWS, M - first_row), BLOCK_M):
        rows = first_row + step + tl.arange(0, BLOCK_M)
        b_dy = tile(dy_ptr, rows, outputs, M, N, stride_ym, stride_yn)
        if NEED_T:
            b_t = dot(b_dy, b_b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), UPCAST)
            put(t_part, b_t, rows, ranks, M, R, R, 1, UPCAST)
        b_s = tile(s_ptr, rows, ranks, M, R, stride_sm, stride_sr)
        db = dot(tl.trans(b_dy), b_s, db, UPCAST)
    put(db_part, db, outputs, ranks, N, R, R, 1, UPCAST)


SPEC = Spec(
    kernel=grads_of_dy_kernel,
    configs={
        2: Config(ROWS=1024, BLOCK_M=64, BLOCK_N=256, num_warps=8, num_stages=3),
        4: Config(ROWS=512, BLOCK_M=16, BLOCK_N=64, num_warps=8, num_stages=2),
    },
    # Wide blocks save traffic (8 r M N / BLOCK_N bytes of partials), but at high ranks wider ones
    # would not fit the registers or the shared memory of every architecture.
    by_rank={2: {16: {"BLOCK_N": 512, "num_stages": 2}, 64: {"BLOCK_N": 128}}},
    specimens={
        "grads_of_dy": Specimen(
            switches={"NEED_T": True},
            types={"b_ptr": "*fp32", "t_ptr": "*fp32", "db_ptr": "*fp32"},
            unit_strides=("stride_yn", "stride_br", "stride_sr"),
        )
    },
    sizes="MN",
    rank_blocks=(16, 32, 64),
    primitives=("grads_of_dy",),
    # 64 rows at least: fewer would be no wgmma
    grid=tuple(
        {"ROWS": rows, "BLOCK_M": 64, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for rows in (256, 512, 1024)
        for n in (256, 512)
        for warps, stages in ((4, 3), (8, 2), (8, 3))
    ),
    call=lambda ops, t, dropout: list(ops.grads_of_dy(t["dy"], t["B"], t["S"], 1.3)),
    traffic=lambda M, N, K, r: 2 * M * (N + 2 * r) + 8 * N * r,
)


def grads_of_dy(
    dy: Tensor,
    B: Tensor | None,
    S: Tensor | None,
    scaling: float,
    T: Tensor | None = None,
    clients: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """`dy [M, N]`, `S [M, r]` (None skips dB) in one dtype, `B [N, r]` or `[C, N, r]` in it or fp32
    (None skips T) → (T `[M, r]`, dB fp32 `[N, r]`, or `[clients, N, r]`).
    """
    if S is None:
        assert B is not None, "without S and B there is nothing to compute"
        return shrink(dy, B.mT, None, scaling, T), None  # T alone needs no partials
    (M, N), R = dy.shape, S.shape[1]
    config = config_for(SPEC, dy, R, (M, N))
    count = clients or 1
    dB = torch.empty(*([clients] if clients else []), N, R, dtype=torch.float32, device=dy.device)
    if B is not None and T is None:
        T = torch.empty(M, R, dtype=dy.dtype, device=dy.device)
    if M == 0:
        return T if B is not None else None, dB.zero_()
    blocks_n, others = cdiv(N, config.BLOCK_N), count * cdiv(R, config.BLOCK_R)
    rows = rows_of(config, M // count, blocks_n * others, multiprocessors(dy.device))
    config, blocks_m = replace(config, ROWS=rows), cdiv(M // count, rows)
    workspace = partial(torch.empty, dtype=torch.float32, device=dy.device)
    db_parts = workspace(blocks_m, count * N, R)
    sums = [(db_parts, dB.view(count * N, R))]
    t_parts = workspace(1, 1, 1)  # never written
    if B is not None and T is not None:
        t_parts = workspace(blocks_n, M, R)
        sums.insert(0, (t_parts, T))
    b = B if B is not None else dy  # never read where it is dy
    grid = (blocks_m, blocks_n, others)
    launch(
        SPEC,
        config,
        grid,
        dy,
        *dy.stride(),
        b,
        b.stride(0) if b.ndim == 3 else 0,
        *b.stride()[-2:],
        S,
        *S.stride(),
        t_parts,
        db_parts,
        M // count,
        N,
        R,
        NEED_T=B is not None,
    )
    sum_partials(sums, scaling)
    return T if B is not None else None, dB
