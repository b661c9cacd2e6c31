"""A matmul with a frozen weight on vendor libraries: PyTorch's own choice, or oneDNN called by its
name where that is faster.

PyTorch gives fp32 matmuls on an x86 CPU to MKL, which keeps its AVX-512 code for Intel's CPUs: on
AMD's Zen 5, whose vectors are 512 bits wide, oneDNN takes half the time
(benchmarks/results/README.md). 16-bit ones are oneDNN's anyway. PyTorch's own switch for oneDNN,
`torch.backends.mkldnn.flags(enabled=False)`, switches this off. Source: the operators that
torch.compile's CPU backend calls, aten/src/ATen/native/mkldnn/Linear.cpp in PyTorch 2.11 to 2.13.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch
from torch import Tensor

# multiply-adds from which the faster library is ahead of what the call costs (10 µs)
_WORTH = 1 << 21
# AMD's family number; older ones compute 512 bits in two halves and have not been measured
_ZEN_5 = 26


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether `abt(a, b)` calls oneDNN: a `[…, k]`, b `[n, k]`."""
    return a.dtype == b.dtype and fits(a, b.shape[0])


def fits(a: Tensor, n: int) -> bool:
    """Whether a product of `a [m, k]` with n rows is oneDNN's."""
    return by_name(a, a.numel() * n)


def by_name(like: Tensor, multiply_adds: int) -> bool:
    """Whether a product of so many multiply-adds, of tensors like `like`, is oneDNN's.

    It follows from the machine, the dtype and the sizes, never from a clock: a run that is repeated
    or resumed computes the same bits.
    """
    if (
        multiply_adds < _WORTH
        or like.dtype != torch.float32
        or not like.is_cpu
        or torch.compiler.is_compiling()
    ):
        return False
    return ahead() and bool(torch.backends.mkldnn.enabled)


def abt(a: Tensor, b: Tensor, bias: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """`a bᵀ + bias + plus` from a `[m, k]`, b `[n, k]`, both of any strides, bias `[n]`, plus `[m,
    n]` (may be overwritten), in a's dtype. No autograd.
    """
    if by_onednn(a, b):
        if plus is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(a, plus, b, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    if plus is not None:
        return (plus if bias is None else plus.add_(bias)).addmm_(a, b.t())
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def ab(a: Tensor, b: Tensor) -> Tensor:
    """`a b` from a `[m, k]`, b `[k, n]`, as abt."""
    if a.dtype == b.dtype and fits(a, b.shape[1]):
        return abt(a, b.t())
    return torch.mm(a, b)


@functools.cache
def ahead() -> bool:
    """Whether oneDNN is the faster library for fp32 on this machine."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    mkl = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return mkl and _amd_family(_cpu()) >= _ZEN_5


def _amd_family(about: str) -> int:
    """The family that an AMD CPU tells, 0 for other makers'."""
    found = re.search(r"family\s*:?\s*(\d+)", about, re.IGNORECASE)
    return int(found[1]) if found and "AuthenticAMD" in about else 0


def _cpu() -> str:
    """What names the CPU's maker and family: Linux's /proc/cpuinfo, elsewhere what Python knows."""
    about = Path("/proc/cpuinfo")
    return about.read_text(errors="replace") if about.is_file() else platform.processor()
