"""W′ = round(W + scaling · B A), from a dense W or while a quantised one is dequantised.

B [N, r], A [r, K], W′ [N, K] in a dtype of its own
dense: W [N, K] of any strides. int8: values [N, K], scale [N]. NF4: as in dequantise_nf4.
Bytes: what W is stored in, read once, and itemsize · N K written; the factors once a tile.

A program owns a tile of W′: a few steps over the ranks in fp32, W added in fp32, one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import dot, put, rounded, tile
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen
from rolora_kernels.weights import NF4, Dense, FrozenWeight, Int8


@triton.jit
def merge_kernel(
    # W [N, K] in a floating type, or int8 values where INT8, or packed uint8 [N K / 2] where NF4
    w_ptr,
    stride_wn,
    stride_wk,
    # fp32 [N] of INT8; absmax of NF4: fp32, or uint8 where DOUBLE
    scale_ptr,
    # of NF4, fp32 [16]; of DOUBLE: code2 fp32 [256], absmax2 fp32, offset fp32 []
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    # A [R, K], B [N, R]
    a_ptr,
    stride_ar,
    stride_ak,
    b_ptr,
    stride_bn,
    stride_br,
    # W′ [N, K]
    out_ptr,
    stride_on,
    stride_ok,
    scaling,
    N,
    K,
    R,
    INT8: tl.constexpr,
    NF4: tl.constexpr,
    DOUBLE: tl.constexpr,
    ABSMAX_BLOCK: tl.constexpr,
    ABSMAX_BLOCK2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        ranks = r + tl.arange(0, BLOCK_R)
        b_b = rounded(tile(b_ptr, outputs, ranks, N, R, stride_bn, stride_br), dtype, UPCAST)
        b_a = rounded(tile(a_ptr, ranks, columns, R, K, stride_ar, stride_ak), dtype, UPCAST)
        acc = dot(b_b, b_a, acc, UPCAST)
    if NF4:
        inside = (outputs[:, None] < N) & (columns[None, :] < K)
        element = outputs[:, None].to(tl.int64) * K + columns[None, :]
        pair = tl.load(w_ptr + element // 2, mask=inside, other=0).to(tl.int32)
        four = tl.where(element % 2 == 0, pair >> 4, pair & 15)
        place = element // ABSMAX_BLOCK
        absmax = tl.load(scale_ptr + place, mask=inside, other=0)
        if DOUBLE:
            fine = tl.load(code2_ptr + absmax.to(tl.int32))
            coarse = tl.load(absmax2_ptr + place // ABSMAX_BLOCK2, mask=inside, other=0.0)
            absmax = fine * coarse + tl.load(offset_ptr)
        w = tl.load(code_ptr + four) * absmax
    else:
        w = tile(w_ptr, outputs, columns, N, K, stride_wn, stride_wk).to(tl.float32)
        if INT8:
            scale = tl.load(scale_ptr + outputs, mask=outputs < N, other=0.0)
            w *= (scale * (1 / 127))[:, None]
    put(out_ptr, w + scaling * acc, outputs, columns, N, K, stride_on, stride_ok, UPCAST)


_DENSE = {
    "INT8": False,
    "NF4": False,
    "DOUBLE": False,
    "ABSMAX_BLOCK": 64,
    "ABSMAX_BLOCK2": 256,
}
_TYPES = {
    name: "*fp32"
    for name in (
        "scale_ptr",
        "code_ptr",
        "code2_ptr",
        "absmax2_ptr",
        "offset_ptr",
        "a_ptr",
        "b_ptr",
    )
}
_KIND = ("INT8", "NF4", "DOUBLE")
_UNIT = ("stride_wk", "stride_ak", "stride_br", "stride_ok")

SPEC = Spec(
    kernel=merge_kernel,
    configs={
        2: Config(BLOCK_N=64, BLOCK_K=128, num_warps=8, num_stages=1),
        4: Config(BLOCK_N=32, BLOCK_K=64, num_warps=8, num_stages=1),
    },
    specimens={
        "merge": Specimen(_DENSE, _TYPES, _UNIT, _KIND),
        "merge_int8": Specimen(_DENSE | {"INT8": True}, _TYPES | {"w_ptr": "*i8"}, _UNIT, _KIND),
        "merge_nf4": Specimen(
            _DENSE | {"NF4": True, "DOUBLE": True},
            _TYPES | {"w_ptr": "*u8", "scale_ptr": "*u8"},
            _UNIT,
            _KIND,
        ),
        "merge_nf4_single": Specimen(
            _DENSE | {"NF4": True}, _TYPES | {"w_ptr": "*u8"}, _UNIT, _KIND
        ),
    },
    sizes="NK",
    rank_blocks=(16, 32),  # it walks over more ranks in steps of 32
    walks_ranks=True,
    primitives=("merge",),
)


def merge(
    weight: Tensor | FrozenWeight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """`weight [N, K]`, `A [r, K]`, `B [N, r]` in fp32 or `dtype` → W′ `[N, K]` in `dtype`. A
    FrozenWeight of another library's is dequantised to `dtype` first, which rounds it once more.
    """
    N, K = weight.shape
    block, block2, read = 64, 256, [A] * 5  # what is not read
    kinds = dict.fromkeys(("INT8", "NF4", "DOUBLE"), False)
    if isinstance(weight, NF4):
        values, block = weight.packed, weight.block
        read[:2], kinds["NF4"] = [weight.absmax, weight.code], True
        if weight.double is not None:
            code2, absmax2, block2, offset = weight.double
            read[2:], kinds["DOUBLE"] = [code2, absmax2, offset], True
    elif isinstance(weight, Int8):
        values, read[0], kinds["INT8"] = weight.values, weight.scale, True
    else:
        values = _dense(weight, dtype)
    out, R = torch.empty(N, K, dtype=dtype, device=A.device), A.shape[0]
    config = config_for(SPEC, out, R, (N, K))
    grid = (cdiv(N, config.BLOCK_N), cdiv(K, config.BLOCK_K))
    launch(
        SPEC,
        config,
        grid,
        values,
        *(values.stride() if values.ndim == 2 else (0, 0)),
        *read,
        A,
        *A.stride(),
        B,
        *B.stride(),
        out,
        *out.stride(),
        scaling,
        N,
        K,
        R,
        **kinds,
        ABSMAX_BLOCK=block,
        ABSMAX_BLOCK2=block2,
    )
    return out


def _dense(weight: Tensor | FrozenWeight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return weight.tensor if isinstance(weight, Dense) else weight.dequantise(dtype)
