"""OUT = drop(X), or OUT += scale · drop(X): dropout's mask made and used in one launch, for vendor
libraries, which cannot make it inside a matmul.

X and OUT [M, K] in one dtype, of any strides.
Bytes: X read and OUT written, where it is added to read as well; the mask is never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.blocks import keep, put, tile
from rolora_kernels.triton_ops.launch import cdiv, config_for, dropout_arguments, launch
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen


@triton.jit(do_not_specialize=("M",))  # batches differ in length
def dropped_kernel(
    # X [M, K]
    x_ptr,
    stride_xm,
    stride_xk,
    # OUT [M, K]
    out_ptr,
    stride_om,
    stride_ok,
    # dropout: the key as blocks.keep reads it
    key_ptr,
    last_dropped,
    scale,
    M,
    K,
    ADD: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)
    value = tile(x_ptr, rows, columns, M, K, stride_xm, stride_xk).to(tl.float32)
    client = tl.program_id(0) * 0  # the rows are those of one batch, whosever they are
    kept = keep(key_ptr, last_dropped, rows, M, client, 1, first, PER_ROW, BLOCK_M, BLOCK_K)
    value = tl.where(kept, value, 0.0)
    if ADD:
        before = tile(out_ptr, rows, columns, M, K, stride_om, stride_ok)
        value = before.to(tl.float32) + scale * value
    put(out_ptr, value, rows, columns, M, K, stride_om, stride_ok, UPCAST)


SPEC = Spec(
    kernel=dropped_kernel,
    configs={width: Config(BLOCK_M=16, BLOCK_K=256, num_stages=1) for width in (2, 4)},
    specimens={
        "dropped": Specimen(
            switches={"ADD": True, "PER_ROW": False},
            unit_strides=("stride_xk", "stride_ok"),
        )
    },
    matmul=False,
)


def dropped(x: Tensor, dropout: Dropout, out: Tensor | None = None) -> Tensor:
    """`x [M, K]` with dropped elements zero and the rest as they are; or, where `out [M, K]` is
    given, `out += scale · that`, rounded once.
    """
    add = out is not None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not x.numel():
        return out
    (M, K), config = x.shape, config_for(SPEC, x)
    key, last_dropped, scale, switches = dropout_arguments(dropout, x)
    launch(
        SPEC,
        config,
        (cdiv(M, config.BLOCK_M), cdiv(K, config.BLOCK_K)),
        x,
        *x.stride(),
        out,
        *out.stride(),
        key,
        last_dropped,
        scale,
        M,
        K,
        ADD=add,
        PER_ROW=switches["PER_ROW"],
    )
    return out
