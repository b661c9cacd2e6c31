"""out = scaling · Σ_p partials[p], for one or two sums in one launch, in a fixed order.

partials [P, rows, columns] fp32, out [rows, columns] of any strides and dtype
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.triton_ops.blocks import rounded
from rolora_kernels.triton_ops.launch import cdiv, config_for, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit
def _sum_one(
    # partials fp32 [P, rows, columns], contiguous
    parts_ptr,
    # out [rows, columns]
    out_ptr,
    stride_row,
    stride_column,
    # which BLOCK elements of out
    block,
    P,
    rows,
    columns,
    scaling,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # 64 bits for where the block starts; within it 32 do, and divide in a quarter of the time.
    first = block.to(tl.int64) * BLOCK
    ahead = tl.arange(0, BLOCK)
    size = tl.cast(rows, tl.int64) * columns
    mask = first + ahead < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in range(P):
        acc += tl.load(parts_ptr + p * size + first + ahead, mask=mask, other=0.0)
    beyond = (first % columns).to(tl.int32) + ahead
    row, column = first // columns + beyond // columns, beyond % columns
    place = row * stride_row + column.to(tl.int64) * stride_column
    tl.store(out_ptr + place, rounded(acc * scaling, out_ptr.dtype.element_ty, UPCAST), mask=mask)


# what follows from the rows of a batch
@triton.jit(do_not_specialize=("a_P", "a_rows", "a_blocks", "b_P", "b_rows"))
def sum_partials_kernel(
    # the first sum: partials fp32 [a_P, a_rows, a_columns], its out, the programs that it takes
    a_ptr,
    a_out_ptr,
    a_stride_row,
    a_stride_column,
    a_P,
    a_rows,
    a_columns,
    a_blocks,
    # the second sum; the programs that are left
    b_ptr,
    b_out_ptr,
    b_stride_row,
    b_stride_column,
    b_P,
    b_rows,
    b_columns,
    scaling,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    block = tl.program_id(0)
    if block < a_blocks:
        _sum_one(
            a_ptr,
            a_out_ptr,
            a_stride_row,
            a_stride_column,
            block,
            a_P,
            a_rows,
            a_columns,
            scaling,
            BLOCK,
            UPCAST,
        )
    else:
        _sum_one(
            b_ptr,
            b_out_ptr,
            b_stride_row,
            b_stride_column,
            block - a_blocks,
            b_P,
            b_rows,
            b_columns,
            scaling,
            BLOCK,
            UPCAST,
        )


SPEC = Spec(
    kernel=sum_partials_kernel,
    configs={4: Config(BLOCK=1024, num_warps=4, num_stages=1)},
    specimens={
        "reduce": Specimen(
            types={"a_ptr": "*fp32", "b_ptr": "*fp32", "b_out_ptr": "*fp32"},
            unit_strides=("a_stride_column", "b_stride_column"),
        )
    },
    matmul=False,
)


def sum_partials(jobs: list[tuple[Tensor, Tensor]], scaling: float) -> None:
    """Fills each `out [rows, columns]` of one or two (partials, out) pairs."""
    config = config_for(SPEC, jobs[0][0])
    blocks, arguments = [], []
    for parts, out in (jobs + jobs)[:2]:  # a single one stands in for the second, unused
        blocks.append(cdiv(out.numel(), config.BLOCK))
        arguments.append((parts, out, *out.stride(), *parts.shape[:1], *out.shape))
    total = sum(blocks[: len(jobs)])
    first, second = arguments
    launch(SPEC, config, (total,), *first, blocks[0], *second, scaling)
