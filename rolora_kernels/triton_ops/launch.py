"""Launch configurations, and the arguments that launchers share.

Shipped configurations are for any GPU without a measured table (rolora_kernels.table); `python -m
rolora_kernels.aot` compiles every one of them for every architecture and shows what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from rolora_kernels import table
from rolora_kernels.dropout import Dropout
from rolora_kernels.triton_ops.blocks import INTERPRETED


@dataclass(frozen=True)
class Config:
    """Block sizes (those a kernel lacks are 0), warps and pipeline stages."""

    BLOCK_M: int = 0
    BLOCK_N: int = 0
    BLOCK_K: int = 0
    BLOCK_R: int = 0
    BLOCK: int = 0
    ROWS: int = 0
    GROUP_M: int = 0
    SPECIALISED: int = 0  # base_tma: warps in groups that load and groups that multiply
    num_warps: int = 4
    num_stages: int = 3

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            name: value for name, value in vars(self).items() if value and name != "SPECIALISED"
        }


# kernel -> width of the element in bytes -> configuration. fp32 is for checking and small models,
# not for speed.
CONFIGS: dict[str, dict[int, Config]] = {
    "shrink": {
        2: Config(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3),
        4: Config(BLOCK_M=32, BLOCK_K=32, num_stages=2),
    },
    "expand_base": {
        2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        4: Config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=2),
    },
    "base_dx": {
        2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3),
        4: Config(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=8, num_stages=2),
    },
    "base_tma": {
        2: Config(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)
    },
    "grads_of_dy": {
        2: Config(ROWS=1024, BLOCK_M=32, BLOCK_N=256, num_warps=8, num_stages=2),
        4: Config(ROWS=512, BLOCK_M=16, BLOCK_N=64, num_warps=8, num_stages=2),
    },
    "grad_A": {
        2: Config(ROWS=1024, BLOCK_M=32, BLOCK_K=256, num_warps=8, num_stages=2),
        # 64 columns would become a TF32 tcgen05 on sm_100 in Triton 3.7.1, `ieee` or not; the AOT
        # table checks it.
        4: Config(ROWS=512, BLOCK_M=16, BLOCK_K=32, num_warps=8, num_stages=2),
    },
    "reduce": {4: Config(BLOCK=1024, num_warps=4, num_stages=1)},
    "dequantise_nf4": {
        width: Config(BLOCK=1024, num_warps=8, num_stages=1) for width in (1, 4)
    },  # of absmax
    "pack": {4: Config(BLOCK=1024, num_warps=4, num_stages=1)},
}


# 16-bit blocks that depend on the rank: wide ones save traffic (grads_of_dy writes 8 r M N /
# BLOCK_N bytes of partials), but at high ranks they would not fit the registers or the shared
# memory of every architecture.
_BY_RANK = {
    "shrink": {64: {"BLOCK_K": 64}},
    "grads_of_dy": {
        16: {"BLOCK_N": 512, "num_stages": 3},
        32: {"BLOCK_M": 64},
        64: {"BLOCK_N": 128},
    },
}
_BY_RANK_FP32 = {"expand_base": {32: {"BLOCK_R": 16}}}


# Warp specialisation is for sm_90: elsewhere Triton 3.7.1 spills or asks for more shared memory
# than there is (the AOT table).
_HOPPER = {"base_tma": {"SPECIALISED": 1, "num_warps": 4, "BLOCK_R": 16}}


def configured(
    kernel: str, width: int, rank_block: int, capability: tuple[int, int] | None = None
) -> Config:
    """The shipped configuration of a kernel for elements of `width` bytes; `rank_block` 0 for a
    kernel without ranks.
    """
    config = replace(CONFIGS[kernel][width], BLOCK_R=rank_block)
    if capability == (9, 0):
        config = replace(config, **_HOPPER.get(kernel, {}))
    by_rank = {2: _BY_RANK, 4: _BY_RANK_FP32}.get(width, {})
    return replace(config, **by_rank.get(kernel, {}).get(rank_block, {}))


def config_for(
    kernel: str,
    like: Tensor,
    rank_block: int = 0,
    sizes: tuple[int, ...] = (),
    primitive: str | None = None,
) -> Config:
    """The configuration of a launch on operands like `like`: what the device's table names for the
    nearest of `sizes`, else the shipped one. `primitive` where it is not called like the kernel.
    """
    return _config_for(kernel, like.device, like.dtype, rank_block, sizes, primitive or kernel)


@table.cached
def _config_for(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    rank_block: int,
    sizes: tuple[int, ...],
    primitive: str,
) -> Config:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    config = configured(kernel, dtype.itemsize, rank_block, capability)
    row = table.nearest(device, primitive, dtype, rank_block, sizes) if sizes else None
    if not row:
        return config
    family = "tma" if kernel == "base_tma" else "triton"
    return replace(config, **row["configs"].get(family, {}))


def rank_block(rank: int) -> int:
    """The padded rank of a block: tensor cores need 16 at least; above 64 a grid axis takes
    over.
    """
    return min(64, max(16, triton.next_power_of_2(rank)))


def dropout_arguments(
    dropout: Dropout | None, like: Tensor
) -> tuple[Tensor, int, float, dict[str, bool]]:
    """(key, threshold, scale, switches) for a kernel; a tensor that is never read stands for the
    key where there is no dropout.
    """
    switches = {
        "DROPOUT": dropout is not None,
        "PER_ROW": dropout is not None and dropout.rows is not None,
    }
    if dropout is None:
        return like, 0, 1.0, switches
    key = dropout.key if dropout.rows is None else torch.stack([dropout.key, dropout.rows])
    return key.to(like.device), round(dropout.p * 2**32), dropout.scale, switches


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
