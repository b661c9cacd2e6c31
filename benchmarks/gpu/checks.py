"""Every primitive against float64 on the same device: odd shapes, every dtype, dropout."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Unit
from benchmarks.gpu.sizes import GATES, Sizes
from rolora_kernels import tune
from rolora_kernels.dropout import Dropout

FACTORS = ("grad_A", "grads_of_dy")  # whose results are factors' gradients


def unit(name: str, sizes: Sizes, tma: bool = False) -> Unit:
    """The checks of one primitive, by our kernels on pointers or (`tma`) on descriptors."""
    kind = " tma" if tma else ""
    return Unit(f"check {name}{kind}", partial(_check, name=name, sizes=sizes, tma=tma), limit=120)


def _check(bench: Bench, name: str, sizes: Sizes, tma: bool) -> None:
    for dtype, (outer, factor) in GATES.items():
        gate = factor if name in FACTORS else outer
        for shape in sizes.odd:
            t = tune.operands(bench.device, *shape, dtype)
            for p in (0.0, 0.05):
                dropout = Dropout(p, torch.tensor(7, device=bench.device)) if p else None
                truth = tune.truth(name, t, dropout)
                for candidate in tune.candidates(name):
                    if (candidate == "tma") != tma or not tune.fits(candidate, t):
                        continue
                    label = f"{candidate} {str(dtype).removeprefix('torch.')} {shape} p={p}"
                    about = {"primitive": name, "candidate": candidate, "gate": gate}
                    work = partial(_error, name, candidate, t, dropout, truth)
                    error = bench.attempt("check", label, work, ok=False, **about)
                    if error is not None:
                        ok = error <= gate
                        bench.add("check", name=label, ok=ok, error=error, **about)


def _error(name: str, candidate: str, t, dropout, truth) -> float:
    return tune.error(tune.call(name, candidate, t, dropout), truth)


def failed(rows: list[dict]) -> list[dict]:
    """The checks that a run failed; a timed contender whose results were wrong is one too."""
    return [
        row
        for row in rows
        if row.get("ok") is False or (row["part"] == "check" and "problem" in row)
    ]
