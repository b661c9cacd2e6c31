"""OUT = mask · scale · L R + P Q + bias: the frozen matmul of both directions as one persistent
kernel on TMA (sm_90 and later).

    forward   P = X [M, K],  Q = Wᵀ [K, N], L = S [M, r], R = Bᵀ [r, N] → Y [M, N]
    backward  P = dY [M, N], Q = W [N, K],  L = T [M, R], R = A [R, K]  → dX [M, K];
              a group's later linears add to dX

Bytes beyond the frozen matmul: as in expand_base and base_dx.

As many programs as the device has multiprocessors walk over the tiles, so that one tile's stores
overlap the next tile's loads. Descriptors are made inside the kernel: with descriptors from the
host, Triton 3.7.1 cannot split a 128-row tile over two consumer warp groups on sm_90. TMA wants a
contiguous last axis, and rows of a multiple of 16 bytes.
"""

from __future__ import annotations

import contextvars
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import dot, keep, rounded
from rolora_kernels.triton_ops.launch import config_for, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit
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
    threshold,
    scale,
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
    SPECIALISED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):
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
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [stride_out, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for number in tl.range(
        tl.program_id(0), tiles_m * tiles_n, programs, flatten=False, warp_specialize=SPECIALISED
    ):
        pid_m, pid_n = tl.swizzle2d(number // tiles_n, number % tiles_n, tiles_m, tiles_n, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if FIRST:
            for r in range(0, R, BLOCK_R):
                if R_TRANSPOSED:
                    b_r = r_desc.load([column, r]).T
                else:
                    b_r = r_desc.load([r, column])
                b_r = rounded(b_r, p_ptr.dtype.element_ty, UPCAST)
                acc = dot(l_desc.load([row, r]), b_r, acc, UPCAST)
            acc *= scale  # in fp32, before anything is rounded
            if DROPOUT:
                kept = keep(key_ptr, threshold, rows, M, row, 1, column, False, BLOCK_M, BLOCK_N)
                acc = tl.where(kept, acc, 0.0)
        else:
            acc += out_desc.load([row, column]).to(tl.float32)
        for k in range(0, K, BLOCK_K):
            b_p = p_desc.load([row, k])
            if TRANSPOSED:
                b_q = q_desc.load([column, k]).T
            else:
                b_q = q_desc.load([k, column])
            acc = dot(b_p, b_q, acc, UPCAST)
        if BIAS:
            b_bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
            acc += b_bias.to(tl.float32)[None, :]
        out_desc.store([row, column], rounded(acc, out_ptr.dtype.element_ty, UPCAST))


# The mask of a forward lies on S, which is made elsewhere.
_FORWARD = {
    "TRANSPOSED": True,
    "R_TRANSPOSED": True,
    "FIRST": True,
    "BIAS": True,
    "DROPOUT": False,
}
_BACKWARD = _FORWARD | {"TRANSPOSED": False, "R_TRANSPOSED": False, "BIAS": False}

SPEC = Spec(
    kernel=base_tma_kernel,
    configs={2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)},
    # Elsewhere Triton 3.7.1 spills, or asks for more shared memory than there is (aot's table).
    hopper={"SPECIALISED": 1, "num_warps": 4, "BLOCK_R": 16},
    # With a mask Triton 3.6 compiles no specialised configuration, and 3.7.1's of 128 × 256 ask for
    # more shared memory than an H100 has.
    masked={2: {"SPECIALISED": 0, "num_warps": 8}},
    specimens={
        "base_tma": Specimen(
            switches=_FORWARD,
            types={"r_ptr": "*fp32"},
            fixed=("R_TRANSPOSED", "FIRST", "DROPOUT"),
        ),
        "base_tma_dx": Specimen(
            switches=_BACKWARD,
            types={"r_ptr": "*fp32"},
            fixed=("R_TRANSPOSED", "BIAS", "DROPOUT"),
        ),
        "base_tma_dx_masked": Specimen(
            switches=_BACKWARD | {"DROPOUT": True},
            types={"r_ptr": "*fp32"},
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
            (128, 128, 4, 3, 1),
            (128, 128, 4, 2, 1),
            (128, 256, 4, 2, 1),
            (64, 128, 4, 3, 1),
            (128, 128, 8, 3, 0),
            (128, 128, 8, 4, 0),
            (128, 256, 8, 3, 0),
        )
    ),
    first_arch=90,
)


def why_not(device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    """None where this kernel can compute on rows of `sizes` elements, else the reason why not."""
    if dtype.itemsize != 2:
        return f"{dtype} is not a 16-bit type"
    if any(size * dtype.itemsize % 16 for size in sizes):
        given = " and ".join(str(size) for size in sizes)
        return f"TMA wants rows of a multiple of 16 bytes, got {given} elements of {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"TMA needs compute capability 9.0, {torch.cuda.get_device_name(device)} has less"
    return None


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
    threshold). Raises ValueError where TMA cannot address the weight; other operands of unsuitable
    strides are copied, L and R into rows of a multiple of 16 bytes.
    """
    (M, N), K = out.shape, P.shape[1]
    W, transposed = _addressable(P, W, N, K, forward)
    sizes, primitive = ((M, N, K), "expand_base") if forward else ((M, K, N), "base_dx")
    masked = dropout is not None and first
    config = config_for(SPEC, P, L.shape[1], sizes, primitive, masked)
    P, L, R = _suited(P), _suited(L), _suited(R)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N)
    programs = min(_multiprocessors(P.device), tiles)
    key, threshold = dropout or (P, 0)
    # An allocator is set for a context: in a copy, because the caller's own is not ours to replace.
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
        threshold,
        scale,
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
        SPECIALISED=bool(config.SPECIALISED),
    )


def _addressable(P: Tensor, W: Tensor, N: int, K: int, forward: bool) -> tuple[Tensor, bool]:
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


def _suited(matrix: Tensor) -> Tensor:
    if _suits(matrix):
        return matrix
    rows, columns = matrix.shape
    padded = matrix.new_empty(rows, triton.cdiv(columns, 8) * 8)
    return padded[:, :columns].copy_(matrix)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """What Triton asks for the memory that descriptors made in a kernel live in."""
    device = torch.device("cuda", torch.cuda.current_device())  # of the launch that asks
    return torch.empty(size, dtype=torch.int8, device=device)


def _launch(config: Config, grid: tuple[int], *operands, **switches) -> None:
    triton.set_allocator(_scratch)
    launch(SPEC, config, grid, *operands, **switches)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
