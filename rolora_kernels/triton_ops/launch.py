"""The one place where a kernel is launched, and the arguments that launchers share: a launch's
configuration, dropout's, the client axis's, and whether a device can run kernels at all.

`python -m rolora_kernels.aot` compiles every shipped configuration for every architecture and shows
what they cost.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rolora_kernels import tuned
from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops import again
from rolora_kernels.triton_ops.blocks import INTERPRETED
from rolora_kernels.triton_ops.spec import Config, Spec

_NONE: dict[str, Any] = {}
_HERE = nullcontext()  # entering one is free, making one is not
WITHOUT_A_GPU = 4  # multiprocessors, for the interpreter


def launch(
    spec: Spec, config: Config, grid: tuple[int, ...], *operands: Any, **switches: Any
) -> None:
    """Launches a kernel on the device of its first operand, a tensor: Triton itself launches on
    the current device, where the addresses of another one are illegal.

    operands: what the kernel takes by place; switches: its constexpr parameters that no
    configuration sets.
    """
    switches["UPCAST"] = INTERPRETED
    options = _NONE if INTERPRETED else spec.options  # the interpreter fuses nothing
    with on_device(operands[0]):
        again.launch(spec, config, grid, operands, switches, options)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """A context in which the current device, and so its current stream, is the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes as long as two allocations."""
    return -(-a // b)


def rows_of(config: Config, M: int, beside: int, free: int) -> int:
    """Rows of M that a program walks down, where `beside` programs share them and a device has
    `free` multiprocessors: ROWS, which costs the least traffic, halved while more than a third of
    the device would idle, four steps are left, and the partials of a block of ranks are no more
    than a quarter of what is read (8 R bytes of them for 2 · rows).
    """
    rows, least = config.ROWS, max(4 * config.BLOCK_M, 16 * config.BLOCK_R)
    while rows > least and 3 * -(-M // rows) * beside < 2 * free:
        rows //= 2
    return rows


def splits_of(programs: int, K: int, step: int, free: int) -> tuple[int, int]:
    """(how many programs share a block of rows, how much of K each walks over): as many as there
    are multiprocessors for, where two thirds of them would idle, and of four steps or more each.
    """
    steps = -(-K // step)
    splits = min(free // programs, steps // 4)
    if 3 * programs > free or splits < 2:
        return 1, K
    each = -(-steps // splits)
    return -(-steps // each), each * step


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, one on each."""
    if device.type != "cuda":
        return WITHOUT_A_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_for(
    spec: Spec,
    like: Tensor,
    rank: int = 0,
    sizes: tuple[int, ...] = (),
    primitive: str | None = None,
    dropout: bool = False,
) -> Config:
    """The configuration of a launch on operands like `like`: what the device's table names for the
    nearest of `sizes` (as spec.sizes names them) and whether there is dropout, else the shipped
    one. `primitive` where the kernel serves several.
    """
    primitive = primitive or next(iter(spec.primitives), "")
    return _config_for(
        spec, like.device, like.dtype, spec.rank_block(rank), tuple(sizes), primitive, dropout
    )


@tuned.cached
def _config_for(
    spec: Spec,
    device: torch.device,
    dtype: torch.dtype,
    rank_block: int,
    sizes: tuple[int, ...],
    primitive: str,
    dropout: bool,
) -> Config:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    config = spec.shipped(dtype.itemsize, rank_block, capability, dropout)
    if not sizes:
        return config
    # Blocks that were measured beside a narrow block of ranks may not fit beside a wider one. A
    # kernel that walks over ranks takes the narrow one along: it is the kernel that was measured.
    row = tuned.nearest(
        device, primitive, dtype, rank_block, sizes, dropout, same_rank=not spec.walks_ranks
    )
    found = (row or {}).get("configs", {}).get(spec.implementation)
    if not row or not found:
        return config
    return replace(config, **{"BLOCK_R": min(row["rank"], config.BLOCK_R), **found})


def dropout_arguments(
    dropout: Dropout | None, like: Tensor
) -> tuple[Tensor, int, float, dict[str, bool]]:
    """(key, last dropped lane, scale, switches) for a kernel; a tensor that is never read stands
    for the key where there is no dropout.
    """
    switches = {
        "DROPOUT": dropout is not None,
        "PER_ROW": dropout is not None and dropout.rows is not None,
    }
    if dropout is None:
        return like, 0, 1.0, switches
    last_dropped = (dropout.last_dropped << 16) | 0xFFFF  # as `blocks.keep` compares it
    key = dropout.key if dropout.rows is None else torch.stack([dropout.key, dropout.rows])
    return key.to(like.device), last_dropped, dropout.scale, switches


def client_axis(factor: Tensor, M: int) -> tuple[int, int, int]:
    """(clients, rows of each, stride from one client's factor to the next) of M rows; a common
    factor is everybody's.
    """
    if factor.ndim == 2:
        return 1, M, 0
    return factor.shape[0], M // factor.shape[0], factor.stride(0)


def can_run(x: Tensor) -> str | None:
    """None where Triton kernels can compute on x, else the reason why not."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} is not one of fp32, bf16, fp16"
    return runs_on(x)


def runs_on(x: Tensor) -> str | None:
    """None where x's device runs Triton kernels, else the reason why not."""
    if (x.is_cuda and torch.version.cuda is not None) or INTERPRETED:
        return None
    return f"x is on {x.device}, and kernels need a CUDA device (or TRITON_INTERPRET=1)"
