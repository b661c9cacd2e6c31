"""A matmul with a frozen weight on vendor libraries: PyTorch's own choice, or oneDNN called by its name where that is faster.

PyTorch gives fp32 matmuls on an x86 CPU to MKL, which keeps its AVX-512 code for Intel's CPUs: on AMD's oneDNN takes half the time
(benchmarks/results/README.md). 16-bit ones are oneDNN's either way; called directly it adds the bias without a pass of its own and
reads a transposed weight a little faster. `torch.backends.mkldnn.flags(enabled=False)`, PyTorch's switch for oneDNN, switches this off.
Source: the operators that torch.compile's CPU backend calls, aten/src/ATen/native/mkldnn/Linear.cpp in PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

_WORTH = 1 << 21  # multiply-adds from which the faster library is ahead of what the call costs (10 µs)


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether `abt(a, b)` calls oneDNN: a `[…, k]`, b `[n, k]`."""
    return a.dtype == b.dtype and fits(a, b.shape[0])


def fits(a: Tensor, n: int) -> bool:
    """Whether a product of `a [m, k]` with n rows is oneDNN's. It follows from the machine, the dtype and the sizes, never from a
    clock: a run that is repeated or resumed computes the same bits."""
    if a.device.type != "cpu" or a.numel() * n < _WORTH or torch.compiler.is_compiling():
        return False
    return a.dtype in dtypes() and torch.backends.mkldnn.enabled


def abt(a: Tensor, b: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`a bᵀ + bias + plus` from a `[m, k]`, b `[n, k]`, both of any strides, bias `[n]`, plus `[m, n]` (may be overwritten); rounded
    once to a's dtype, twice with `plus`. No autograd."""
    if by_onednn(a, b):
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(a, plus, b, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    if plus is not None:
        return (plus if bias is None else plus.add_(bias)).addmm_(a, b.t())
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


@functools.cache
def dtypes() -> tuple[torch.dtype, ...]:
    """Those for which oneDNN is called directly on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    found = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    if torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _cpu():
        found = (torch.float32, *found)
    return found


def _cpu() -> str:
    """What names the CPU's maker: Linux's /proc/cpuinfo, elsewhere what Python knows."""
    about = Path("/proc/cpuinfo")
    return about.read_text(errors="replace") if about.is_file() else platform.processor()
