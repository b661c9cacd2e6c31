"""W[i] = code[q_i] · absmax[i / block]: 4-bit to dense in one launch.

Double-quantised: absmax[j] = code2[a_j] · absmax2[j / block2] + offset.

    packed uint8 [n / 2], the earlier element in the high nibble; code fp32 [16]
    absmax fp32 [n / block]; double: uint8, with code2 fp32 [256], absmax2 fp32 [n / block / block2]
    and offset fp32 []
    out [n]

Bytes: n / 2 + 4 n / block (double: n / block + 4 n / block / block2) read, 2 n written in a 16-bit
type.

The layout and the order of roundings are bitsandbytes' (functional.dequantize_4bit, 0.50): every
product and sum is rounded to fp32, so the compiler may not fuse them (enable_fp_fusion=False).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import rounded
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit
def dequantise_nf4_kernel(
    # packed uint8 [size / 2], and what its 16 codes mean: fp32 [16]
    packed_ptr,
    code_ptr,
    # absmax [size / block]: fp32, or uint8 where DOUBLE
    absmax_ptr,
    # of DOUBLE: code2 fp32 [256], absmax2 fp32 [size / block / block2], offset fp32 []
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    # out [size]
    out_ptr,
    size,
    block: tl.constexpr,
    block2: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first + tl.arange(0, BLOCK)
    inside = 2 * byte < size
    pair = tl.load(packed_ptr + byte, mask=inside, other=0).to(tl.int32)
    place = 2 * byte // block  # a block has an even length, so both elements of a byte share it
    absmax = tl.load(absmax_ptr + place, mask=inside, other=0)
    if DOUBLE:
        fine = tl.load(code2_ptr + absmax.to(tl.int32))
        coarse = tl.load(absmax2_ptr + place // block2, mask=inside, other=0.0)
        absmax = fine * coarse + tl.load(offset_ptr)
    earlier = tl.load(code_ptr + (pair >> 4)) * absmax
    later = tl.load(code_ptr + (pair & 15)) * absmax
    values = tl.reshape(tl.join(earlier, later), [2 * BLOCK])
    element = 2 * first + tl.arange(0, 2 * BLOCK)
    out = rounded(values, out_ptr.dtype.element_ty, UPCAST)
    tl.store(out_ptr + element, out, mask=element < size)


_TYPES = {
    "packed_ptr": "*u8",
    "code_ptr": "*fp32",
    "absmax_ptr": "*u8",
    "code2_ptr": "*fp32",
    "absmax2_ptr": "*fp32",
    "offset_ptr": "*fp32",
}
_BLOCKS = {"block": 64, "block2": 256}

SPEC = Spec(
    kernel=dequantise_nf4_kernel,
    # by the width of absmax
    configs={width: Config(BLOCK=1024, num_warps=8, num_stages=1) for width in (1, 4)},
    options={"enable_fp_fusion": False},
    specimens={
        "dequantise_nf4": Specimen(
            switches={"DOUBLE": True, **_BLOCKS}, types=_TYPES, fixed=("DOUBLE",)
        ),
        "dequantise_nf4_single": Specimen(
            switches={"DOUBLE": False, **_BLOCKS},
            types={**_TYPES, "absmax_ptr": "*fp32"},
            fixed=("DOUBLE",),
        ),
    },
    sizes="NK",
    primitives=("dequantise",),
    matmul=False,
)


def dequantise_nf4(
    packed: Tensor,
    code: Tensor,
    absmax: Tensor,
    block: int,
    double: tuple[Tensor, Tensor, int, Tensor] | None,
    out: Tensor,
) -> Tensor:
    """Fills the contiguous `out` of n elements; `double` is (code2, absmax2, block2, offset) where
    absmax is uint8.
    """
    config = config_for(SPEC, absmax)
    code2, absmax2, block2, offset = double or (absmax, absmax, 1, absmax)
    launch(
        SPEC,
        config,
        (cdiv(packed.numel(), config.BLOCK),),
        packed,
        code,
        absmax,
        code2,
        absmax2,
        offset,
        out,
        out.numel(),
        block=block,
        block2=block2,
        DOUBLE=double is not None,
    )
    return out
