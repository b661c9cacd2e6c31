"""What the device can do at best: a large product, a copy, and a kernel launch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.sizes import Sizes


def units(sizes: Sizes) -> Iterator[Unit]:
    yield Unit("ceilings", partial(_ceilings, sizes=sizes))


def _ceilings(bench: Bench, sizes: Sizes) -> None:
    make = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    n = sizes.gemm
    a, b, product = make(n, n), make(n, n), make(n, n)

    def multiply(i: int) -> None:
        torch.mm(a, b, out=product)

    bench.contest(
        "ceilings", {"gemm": lambda: Entry(multiply)}, "gemm", flops=2.0 * n**3, M=n, N=n, K=n
    )
    wide = sizes.copied // 2
    source = torch.empty(wide, dtype=torch.bfloat16, device=bench.device).normal_()
    target = torch.empty_like(source)
    copied = {"copy": lambda: Entry(lambda i: target.copy_(source))}
    bench.contest("ceilings", copied, "copy", moved=4.0 * wide)
    few = make(16)
    tiny = {"launch": lambda: Entry(lambda i: few.add_(1.0))}
    bench.contest("ceilings", tiny, "launch", inner=100)
