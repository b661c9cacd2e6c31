"""What vendor libraries can do for the frozen product and what stands beside it: the product alone,
with the low-rank product added to Y afterwards, with a wider K, and with a weight that is merged
first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.sizes import Sizes

PAD = 64  # columns that rows are longer than K: a stride of K alone may not suit the library


def units(sizes: Sizes) -> Iterator[Unit]:
    for N, K in sizes.linears:
        for M in (sizes.M, sizes.few_rows):
            run = partial(_products, M=M, N=N, K=K, r=sizes.rank)
            yield Unit(f"product M={M} N={N} K={K}", run)


def _products(bench: Bench, M: int, N: int, K: int, r: int) -> None:
    make = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    count = bench.copies(2 * (M * K + M * N))
    xs = [make(M, K + PAD) for _ in range(count)]
    ys = [make(M, N) for _ in range(count)]
    W, S, A, B = make(N, K + PAD), make(M, r), make(r, K), make(N, r)
    narrow, merged = W[:, :K].contiguous(), torch.empty_like(W[:, :K].contiguous())
    rows = [x[:, :K].contiguous() for x in xs]

    def product(i: int) -> Tensor:
        return torch.mm(rows[i % count], narrow.t(), out=ys[i % count])

    def added(i: int) -> Tensor:
        return product(i).addmm_(S, B.t(), alpha=0.5)

    def wider(i: int, extra: int) -> Tensor:
        x, wide = xs[i % count][:, : K + extra], W[:, : K + extra]
        return torch.mm(x, wide.t(), out=ys[i % count])

    def merge(i: int) -> Tensor:
        return torch.addmm(narrow, B, A, alpha=0.5, out=merged)

    def by_merged(i: int) -> Tensor:
        return torch.mm(rows[i % count], merge(i).t(), out=ys[i % count])

    calls = {
        "product": product,
        "product, then Y += S Bᵀ": added,
        "K + 0, longer rows": partial(wider, extra=0),
        "K + 16": partial(wider, extra=16),
        "K + 64": partial(wider, extra=64),
        "merging alone": merge,
        "merging, product": by_merged,
    }
    makes = {name: (lambda call=call: Entry(call)) for name, call in calls.items()}
    bench.contest("product", makes, "product", M=M, N=N, K=K, r=r)
