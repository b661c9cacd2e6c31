"""OUT = mask · L R + P Q + bias: the frozen matmul of both directions as one persistent kernel on
TMA (sm_90 and later).

    forward   P = X [M, K],  Q = Wᵀ [K, N], L = S [M, r], R = s Bᵀ [r, N] → Y [M, N]
    backward  P = dY [M, N], Q = W [N, K],  L = T [M, R], R = A [R, K]    → dX [M, K];
              a group's later linears add to dX

Bytes beyond the frozen matmul: as in expand_base and base_dx, and 6 r N to make R, which is scaled
in fp32 and rounded once, before the launch.

As many programs as the device has multiprocessors walk over the tiles, so that one tile's stores
overlap the next tile's loads. A tile steps over K first and over the ranks last, when the memory of
the pipeline is free again, and a wide one is stored in halves: so 128 × 256 fits in four stages,
with which L2 keeps up (a step brings 48 KiB for 2,048 cycles of products; of 128 × 128, 32 KiB for
1,024). A mask lies on the ranks' part alone, which comes first then. Descriptors are made inside
the kernel: with descriptors from the host, Triton 3.7.1 cannot split a 128-row tile over two
consumer warp groups on sm_90.
"""

from __future__ import annotations

import contextvars
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import dot, keep, rounded
from rolora_kernels.triton_ops.descriptors import addressable, scaled, suited
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch, multiprocessors
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit(do_not_specialize=("M", "programs"))  # batches differ in length
def base_tma_kernel(
    # P [M, K]; every matrix has a contiguous last axis
    p_ptr,
    stride_p,
    # Q [K, N], or where TRANSPOSED [N, K]
    q_ptr,
    stride_q,
    # L [M, R]
    l_ptr,
    stride_l,
    # R [R, N], or where R_TRANSPOSED [N, R]
    r_ptr,
    stride_r,
    # bias [N]
    bias_ptr,
    # OUT [M, N]
    out_ptr,
    stride_out,
    # dropout: a key for all rows
    key_ptr,
    last_dropped,
    # sizes, in the letters of OUT = P Q
    M,
    N,
    K,
    R,
    programs,
    TRANSPOSED: tl.constexpr,
    R_TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    # more ranks than a block has; Triton compiles no warp groups for the loop over them
    WALKS: tl.constexpr,
    SPECIALISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
    STORED: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 128 else BLOCK_N
    p_desc = tl.make_tensor_descriptor(p_ptr, [M, K], [stride_p, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        q_desc = tl.make_tensor_descriptor(q_ptr, [N, K], [stride_q, 1], [BLOCK_N, BLOCK_K])
    else:
        q_desc = tl.make_tensor_descriptor(q_ptr, [K, N], [stride_q, 1], [BLOCK_K, BLOCK_N])
    if R_TRANSPOSED:
        r_desc = tl.make_tensor_descriptor(r_ptr, [N, R], [stride_r, 1], [BLOCK_N, BLOCK_R])
    else:
        r_desc = tl.make_tensor_descriptor(r_ptr, [R, N], [stride_r, 1], [BLOCK_R, BLOCK_N])
    l_desc = tl.make_tensor_descriptor(l_ptr, [M, R], [stride_l, 1], [BLOCK_M, BLOCK_R])
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [stride_out, 1], [BLOCK_M, STORED])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for number in tl.range(
        tl.program_id(0), tiles_m * tiles_n, programs, flatten=False, warp_specialize=SPECIALISED
    ):
        pid_m, pid_n = tl.swizzle2d(number // tiles_n, number % tiles_n, tiles_m, tiles_n, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if FIRST and DROPOUT:
            acc = _ranks(l_desc, r_desc, row, column, R, acc, R_TRANSPOSED, WALKS, BLOCK_R, UPCAST)
            rows = row + tl.arange(0, BLOCK_M)
            kept = keep(key_ptr, last_dropped, rows, M, row, 1, column, False, BLOCK_M, BLOCK_N)
            acc = tl.where(kept, acc, 0.0)
        for k in range(0, K, BLOCK_K):
            b_p = p_desc.load([row, k])
            if TRANSPOSED:
                b_q = q_desc.load([column, k]).T
            else:
                b_q = q_desc.load([k, column])
            acc = dot(b_p, b_q, acc, UPCAST)
        if FIRST and not DROPOUT:
            acc = _ranks(l_desc, r_desc, row, column, R, acc, R_TRANSPOSED, WALKS, BLOCK_R, UPCAST)
        if STORED == BLOCK_N:
            _finish(out_desc, acc, row, column, bias_ptr, N, FIRST, BIAS, STORED, UPCAST)
        else:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, STORED)), (0, 2, 1))
            left, right = tl.split(halves)
            _finish(out_desc, left, row, column, bias_ptr, N, FIRST, BIAS, STORED, UPCAST)
            column += STORED
            _finish(out_desc, right, row, column, bias_ptr, N, FIRST, BIAS, STORED, UPCAST)


@triton.jit
def _ranks(
    l_desc,
    r_desc,
    row,
    column,
    R,
    acc,
    R_TRANSPOSED: tl.constexpr,
    WALKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc + L R"""
    end = R if WALKS else 1  # a loop of one step is none to the compiler
    # What no step changes stays in the few steps: held through a tile, beside a mask, ptxas spills
    # it (Triton 3.6, sm_100).
    for r in tl.range(0, end, BLOCK_R, disable_licm=True):
        if R_TRANSPOSED:
            b_r = r_desc.load([column, r]).T
        else:
            b_r = r_desc.load([r, column])
        acc = dot(l_desc.load([row, r]), b_r, acc, UPCAST)
    return acc


@triton.jit
def _finish(
    out_desc,
    part,
    row,
    column,
    bias_ptr,
    N,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Stores part of a tile, with the bias, or beside what is there already."""
    if BIAS:
        columns = column + tl.arange(0, COLUMNS)
        b_bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        part += b_bias.to(tl.float32)[None, :]
    if not FIRST:
        part += out_desc.load([row, column]).to(tl.float32)
    out_desc.store([row, column], rounded(part, out_desc.dtype, UPCAST))


# The mask of a forward lies on S, which is made elsewhere.
_FORWARD = {
    "TRANSPOSED": True,
    "R_TRANSPOSED": True,
    "FIRST": True,
    "BIAS": True,
    "DROPOUT": False,
    "WALKS": False,
}
_BACKWARD = _FORWARD | {"TRANSPOSED": False, "R_TRANSPOSED": False, "BIAS": False}

SPEC = Spec(
    kernel=base_tma_kernel,
    configs={2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)},
    hopper={"BLOCK_N": 256, "num_stages": 4},
    # A mask of 128 × 256 spills, and Triton 3.6 compiles none with warp groups.
    masked={2: {"SPECIALISED": 0, "num_warps": 8, "BLOCK_N": 128, "num_stages": 3}},
    specimens={
        "base_tma": Specimen(switches=_FORWARD, fixed=("R_TRANSPOSED", "FIRST", "DROPOUT")),
        "base_tma_dx": Specimen(switches=_BACKWARD, fixed=("R_TRANSPOSED", "BIAS", "DROPOUT")),
        "base_tma_dx_masked": Specimen(
            switches=_BACKWARD | {"DROPOUT": True},
            fixed=("R_TRANSPOSED", "BIAS", "DROPOUT", "FIRST"),
        ),
    },
    sizes="MNK",
    rank_blocks=(16, 32),  # it walks over more ranks in steps of 32
    walks_ranks=True,
    primitives=("expand_base", "base_dx"),
    implementation="tma",
    grid=tuple(
        {
            "BLOCK_M": m,
            "BLOCK_N": n,
            "BLOCK_K": 64,
            "num_warps": warps,
            "num_stages": stages,
            "SPECIALISED": specialised,
        }
        for m, n, warps, stages, specialised in (
            (128, 256, 8, 4, 0),
            (128, 256, 8, 3, 0),
            (128, 128, 8, 4, 0),  # where 128 × 256 leaves multiprocessors without a tile
            (128, 256, 4, 3, 1),  # Triton 3.7 and later
            (128, 128, 4, 3, 1),
        )
    ),
    first_arch=90,
)


def base_tma(
    P: Tensor,
    W: Tensor,
    L: Tensor,
    R: Tensor,
    scale: float,
    bias: Tensor | None,
    out: Tensor,
    *,
    forward: bool,
    first: bool = True,
    dropout: tuple[Tensor, int] | None = None,
) -> None:
    """Fills `out [M, N]` from `P [M, K]`, `L [M, r]` and, forward, `W [N, K]`, `R [N, r]`, else `W
    [K, N]`, `R [r, N]`, all in one 16-bit dtype but R, which may be fp32; `dropout` is (key,
    last_dropped). `scale · R` is rounded to that dtype once, which is no further rounding of an
    fp32 R. Raises ValueError where TMA cannot address the weight; other operands of unsuitable
    strides are copied, L and R into rows of a multiple of 16 bytes.
    """
    (M, N), K = out.shape, P.shape[1]
    W, transposed = addressable(P, W, N, K, forward)
    sizes, primitive = ((M, N, K), "expand_base") if forward else ((M, K, N), "base_dx")
    masked = dropout is not None and first
    config = config_for(SPEC, P, L.shape[1], sizes, primitive, masked)
    walks = L.shape[1] > config.BLOCK_R
    if walks:
        config = replace(config, SPECIALISED=0, num_warps=8)
    P, L = suited(P), suited(L)
    # the later linears of a group have no part of the ranks to add
    R = scaled(R, scale, P.dtype) if first else L
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    programs = min(multiprocessors(P.device), tiles)
    key, last_dropped = dropout or (P, 0)
    # in a copied context: an allocator is set for one, and the caller's is not ours to replace
    contextvars.copy_context().run(
        _launch,
        config,
        (programs,),
        P,
        P.stride(0),
        W,
        W.stride(0),
        L,
        L.stride(0),
        R,
        R.stride(0),
        out if bias is None else bias.contiguous(),
        out,
        out.stride(0),
        key,
        last_dropped,
        M,
        N,
        K,
        L.shape[1],
        programs,
        TRANSPOSED=transposed,
        R_TRANSPOSED=forward,
        FIRST=first,
        BIAS=bias is not None,
        DROPOUT=masked,
        WALKS=walks,
        SPECIALISED=bool(config.SPECIALISED),
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """What Triton asks for the memory that descriptors made in a kernel live in."""
    device = torch.device("cuda", torch.cuda.current_device())  # of the launch that asks
    return torch.empty(size, dtype=torch.int8, device=device)


def _launch(config: Config, grid: tuple[int], *operands, **switches) -> None:
    triton.set_allocator(_scratch)
    launch(SPEC, config, grid, *operands, **switches)
