"""What vendor libraries make of a dropout mask (dropout): elements set to zero, or added where they
are kept; one launch of ours on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import torch
from torch import Tensor

from rolora_kernels.dropout import Dropout, keep_mask

_CHUNK = 1 << 18  # elements whose int64 temporaries stay in cache together
_GPU_CHUNK = 1 << 24  # a GPU without Triton: few launches before small temporaries


def zero_dropped(x: Tensor, dropout: Dropout, out: Tensor | None = None) -> Tensor:
    """`x [M, K]` with dropped elements zero and the rest as they are, not yet scaled; into `out`,
    which may be x, where given.
    """
    rows, columns = x.shape
    if torch.compiler.is_compiling():
        return torch.where(keep_mask(range(rows), columns, dropout), x, 0.0)
    if by_kernel(x):
        from rolora_kernels.triton_ops.dropped import dropped

        return dropped(x, dropout)
    # A few rows at a time: the mask is made of int64 temporaries, eight bytes an element each.
    out = torch.empty_like(x) if out is None else out
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    rows_at_once = max(1, (_GPU_CHUNK if x.is_cuda else _CHUNK) // max(1, columns))
    for first in range(0, rows, rows_at_once):
        end = min(first + rows_at_once, rows)
        kept = _kept(range(first, end), columns, dropout)
        torch.where(kept, x[first:end], zero, out=out[first:end])
    return out


def remembering(dropout: Dropout, x: Tensor) -> Dropout:
    """The dropout of a forward whose backward will ask again. On a CPU its mask is kept, a byte an
    element, as PyTorch's own dropout keeps it (times and bytes: benchmarks/results/README.md).
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return dropout
    return replace(dropout, made={})


def _kept(rows: range, columns: int, dropout: Dropout) -> Tensor:
    """The mask of some rows: from `dropout.made`, where an earlier use has left it."""
    if dropout.made is None:
        return keep_mask(rows, columns, dropout)
    place = rows.start, rows.stop, columns
    found = dropout.made.get(place)
    if found is None:
        found = dropout.made[place] = keep_mask(rows, columns, dropout)
    return found


def add_dropped(out: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """out += scale · drop(x) in place, both `[M, K]`; x may be overwritten."""
    if not torch.compiler.is_compiling() and by_kernel(x):
        from rolora_kernels.triton_ops.dropped import dropped

        return dropped(x, dropout, out)
    into = None if torch.compiler.is_compiling() else x
    return out.add_(zero_dropped(x, dropout, into), alpha=dropout.scale)


def by_kernel(x: Tensor) -> bool:
    """Whether one launch of ours makes a mask for x: on a GPU that has Triton. PyTorch's integer
    operators take a hundred launches for the ten rounds.
    """
    return x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and _triton()


@functools.cache
def _triton() -> bool:
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
