"""The device of a run, and the attention that is good there."""

from __future__ import annotations

import os

import torch

from rolora.errors import BadInput


def pick_device(name: str) -> torch.device:
    """The device of a name; under torchrun every rank has the GPU of its own local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def pick_attention(
    name: str, device: torch.device, dtype: torch.dtype, length: int, fused: bool = True
) -> str:
    """The attention of a name; `fused`: whether the model has PyTorch's fused attention.

    It is slow on a CPU in 16 bits: plain matmuls take under half of its time up to 128 tokens, two
    thirds at 256 (benchmarks/results/README.md), but keep the probabilities, [batch, heads, length,
    length].
    """
    if name != "auto":
        return name
    if not fused or (device.type == "cpu" and dtype != torch.float32 and length <= 128):
        return "eager"
    return "sdpa"
