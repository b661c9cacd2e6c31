"""What several kernels share: masked tiles, the dropout mask, and the dot product in the right
precision.

In the interpreter (TRITON_INTERPRET=1) `tl.dot` on bf16 is wrong, so operands are raised to fp32
there: UPCAST. On a GPU fp32 operands are multiplied in IEEE precision, never TF32.
"""

from __future__ import annotations

import os
from importlib.metadata import version

import triton
import triton.language as tl


def _check_interpreter(triton_version: str, numpy_version: str) -> None:
    """Raises ImportError where Triton's interpreter cannot run."""
    old, new = _version(triton_version) < (3, 7), _version(numpy_version) >= (2, 4)
    if old and new:
        raise ImportError(
            f"the interpreter of Triton {triton_version} fails with NumPy {numpy_version}: install "
            '"numpy<2.4", or "triton>=3.7"'
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    _check_interpreter(triton.__version__, version("numpy"))


@triton.jit
def tile(ptr, rows, columns, row_count, column_count, stride_row, stride_column):
    """`[rows, columns]` of a matrix, zero outside; 64-bit addresses."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = (
        rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    )
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def rounded(value, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """`value` in `dtype`, to nearest even: results before they are stored, and fp32 factors as they
    are loaded. The interpreter cuts bf16 off instead, so there the rounding is done on the bits.
    """
    if UPCAST and dtype == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def put(
    ptr,
    value,
    rows,
    columns,
    row_count,
    column_count,
    stride_row,
    stride_column,
    UPCAST: tl.constexpr,
):
    """Stores a tile, rounded to the pointer's type."""
    mask = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = (
        rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    )
    tl.store(ptr + offsets, rounded(value, ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b with an fp32 accumulator."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def flushed(total, acc, terms, SPAN: tl.constexpr = 1024):
    """(total, acc) of an fp32 sum in parts of SPAN terms, of which `terms` were taken: a part that
    is full is added to the total, and the next begins. On a GPU a product adds its terms one after
    another, and the error of one chain of 11,008 is 1.9e-6.
    """
    full = terms % SPAN == 0
    return tl.where(full, total + acc, total), tl.where(full, 0.0, acc)


@triton.jit
def at_client(ptr, client, count, stride):
    """A matrix's pointer at a client's first row (its `count` rows lie `stride` apart) or, count 1,
    at its own factor.
    """
    return ptr + client.to(tl.int64) * count * stride


@triton.jit
def keep(
    key_ptr,
    last_dropped,
    rows,
    row_count,
    client,
    clients,
    first_column,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mask of rolora_kernels.dropout for `[ROWS, COLUMNS]` from `first_column` (a multiple of
    8) on: each Philox block decides eight neighbouring columns.

    `last_dropped` is the mask's, in the upper half of an int32 whose lower half is ones: so words
    are compared whole. PER_ROW: key_ptr is `[2, clients, row_count]`, every row's key and its place
    in its batch.
    """
    block = first_column // 8 + tl.arange(0, COLUMNS // 8)
    if PER_ROW:
        inside, own = rows < row_count, at_client(key_ptr, client, row_count, 1)
        key = tl.load(own + rows, mask=inside, other=0)[:, None]
        places = tl.load(own + clients * row_count + rows, mask=inside, other=0)
    else:
        key, places = tl.load(key_ptr), rows
    c0, c1 = tl.broadcast(block[None, :].to(tl.uint32), places[:, None].to(tl.uint32))
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(key, c0, c1, zero, zero, n_rounds=7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    lanes = tl.join(words << 16, words)  # each in the upper half of its word
    return tl.reshape(lanes, [ROWS, COLUMNS]) > last_dropped
