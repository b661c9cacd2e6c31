"""4-bit weights: dequantised to bf16 by torch and by our kernel, bit for bit; and a layer on
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.sizes import Sizes
from rolora_kernels import lora_linear, tune, use_backend
from rolora_kernels.weights import NF4, frozen_linear

BLOCK = 64


def units(sizes: Sizes) -> Iterator[Unit]:
    for N, K in sizes.linears:
        yield Unit(f"nf4 N={N} K={K}", partial(_nf4, N=N, K=K, M=sizes.M, r=sizes.rank), limit=90)


def _weight(N: int, K: int, device: str) -> NF4:
    size = N * K
    blocks = -(-size // BLOCK)
    double = (
        torch.linspace(0, 1, 256, device=device),
        torch.rand(-(-blocks // 256), device=device),
        256,
        torch.tensor(0.1, device=device),
    )
    return NF4(
        torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        torch.linspace(-1, 1, 16, device=device),
        (N, K),
        BLOCK,
        double,
    )


def _nf4(bench: Bench, N: int, K: int, M: int, r: int) -> None:
    weight = _weight(N, K, bench.device)
    out = torch.empty(N, K, dtype=torch.bfloat16, device=bench.device)

    def by(backend: str) -> Tensor:
        with use_backend(backend):
            return weight.dequantise(torch.bfloat16, out)

    truth = by("torch").clone()
    same = bench.attempt("check", "dequantise_nf4", lambda: torch.equal(by("triton"), truth))
    if same is not None:
        bench.add("check", name=f"dequantise_nf4 N={N} K={K}", ok=same)
    makes = {name: partial(_entry, partial(by, name)) for name in ("torch", "triton")}
    moved = N * K * (0.5 + 1 / BLOCK + 2)
    times = bench.contest("dequantise", makes, "torch", moved=moved, N=N, K=K)
    if same and len(times) == 2:
        row = {"primitive": "dequantise", "dtype": "bfloat16", "rank": 0, "sizes": [N, K]}
        ratio = statistics.median(
            ours.ms / theirs.ms
            for ours, theirs in zip(times["triton"], times["torch"], strict=False)
        )
        winner = "triton" if ratio < tune.WORTH else "torch"
        bench.results.tuned.append(row | {"winner": winner, "configs": {}})
    _layer(bench, weight, M, r)


def _entry(call: Callable[[], object]) -> Entry:
    return Entry(lambda i: call())


def _layer(bench: Bench, weight: NF4, M: int, r: int) -> None:
    """Forward and backward of a linear on the weight, phase B."""
    N, K = weight.shape
    make = partial(torch.randn, device=bench.device)
    x = make(M, K).bfloat16().requires_grad_()
    dy, A, B = make(M, N).bfloat16(), make(r, K) * K**-0.5, make(N, r).requires_grad_()

    def step(backend: str, adapted: bool) -> object:
        x.grad = B.grad = None
        with use_backend(backend):
            y = lora_linear(x, weight, A, B, 2.0) if adapted else frozen_linear(x, weight)
            return y.backward(dy)

    skinny = "triton[shrink,grads_of_dy,dequantise]"
    makes = {
        "frozen, torch": ("torch", False),
        "frozen, our dequantise": ("triton[dequantise]", False),
        "ours vendor": ("torch", True),
        "ours vendor, our dequantise": ("triton[dequantise]", True),
        "ours skinny, our dequantise": (skinny, True),
        "ours merged, skinny": (f"merged+{skinny}".replace("dequantise", "merge"), True),
        "ours kernels": ("triton", True),
    }
    contest = {name: partial(_entry, partial(step, *how)) for name, how in makes.items()}
    about = {"M": M, "N": N, "K": K, "r": r, "phase": "B"}
    base = "frozen, our dequantise"
    bench.contest("nf4_layer", contest, base, flops=4.0 * M * N * K, **about)
