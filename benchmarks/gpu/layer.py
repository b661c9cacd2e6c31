"""Forward and backward of one adapted linear: frozen, PEFT, a manual backward, ours by every
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from benchmarks.gpu import contenders
from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.contenders import Contender, Problem
from benchmarks.gpu.sizes import GATES, Sizes
from benchmarks.layers import kept_bytes, own_storages
from rolora_kernels.triton_ops.descriptors import why_not

Make = Callable[[Problem], Contender]
PEFT: dict[str, Make] = {
    "peft_default": contenders.peft_default,
    "peft_bf16": contenders.peft_bf16,
    "peft_phase": contenders.peft_phase,
}


def first_units(sizes: Sizes, also: ModuleType | None) -> Iterator[Unit]:
    """What the targets speak of: phases B and A at the first size, then few rows."""
    for phase, M in (("B", sizes.M), ("A", sizes.M), ("B", sizes.few_rows)):
        for N, K in sizes.linears:
            compiled = phase == "B" and M == sizes.M
            yield _unit(M, N, K, sizes.rank, phase, 0.0, also, compiled=compiled)


def more_units(sizes: Sizes, also: ModuleType | None) -> Iterator[Unit]:
    """Dropout, both factors, other ranks and other numbers of rows."""
    first = (sizes.M, sizes.rank)
    rest = [
        (*first, "B", 0.05),
        (*first, "A", 0.05),
        (*first, "BOTH", 0.0),
        *((sizes.M, r, "B", 0.0) for r in sizes.other_ranks),
        *((M, sizes.rank, "B", 0.0) for M in sizes.other_rows),
    ]
    for M, r, phase, p in rest:
        for N, K in sizes.linears:
            yield _unit(M, N, K, r, phase, p, also)


def tma_units(sizes: Sizes) -> Iterator[Unit]:
    """Our layer with the persistent TMA kernels."""
    for phase, p in (("B", 0.0), ("A", 0.0), ("B", 0.05)):
        for N, K in sizes.linears:
            run = partial(_tma, M=sizes.M, N=N, K=K, r=sizes.rank, phase=phase, p=p)
            yield Unit(f"layer tma {_named(sizes.M, N, K, sizes.rank, phase, p)}", run, limit=60)


def _named(M: int, N: int, K: int, r: int, phase: str, p: float) -> str:
    return f"M={M} N={N} K={K} r={r} phase={phase} p={p}"


def _unit(M, N, K, r, phase, p, also, compiled=False) -> Unit:
    run = partial(_layer, M=M, N=N, K=K, r=r, phase=phase, p=p, also=also, compiled=compiled)
    return Unit(f"layer {_named(M, N, K, r, phase, p)}", run, limit=90)


def _layer(bench: Bench, also: ModuleType | None, compiled: bool, **sizes) -> None:
    problem = _problem(bench, **sizes)
    makes: dict[str, Make] = {"frozen": contenders.frozen, **PEFT}
    if not problem.p:
        makes["manual"] = contenders.manual  # it has no dropout
    for name, plan in contenders.plans(problem.p).items():
        makes[f"ours {name}"] = partial(contenders.ours, plan=plan)
    if bench.results.tuned:
        makes["ours"] = contenders.ours
    if also is not None:
        makes |= also.contenders(problem)
    if compiled:
        makes["peft_compiled"] = contenders.peft_compiled
    _contest(bench, problem, makes, **sizes)


def _tma(bench: Bench, **sizes) -> None:
    problem = _problem(bench, **sizes)
    reason = why_not(problem.xs[0].device, problem.dtype, problem.N, problem.K)
    if reason is not None:
        bench.add("layer", name="ours tma", problem=reason, **sizes)
        return
    makes = {
        "frozen": contenders.frozen,
        "ours vendor": partial(contenders.ours, plan=contenders.TORCH),
        "ours tma": partial(contenders.ours, plan=contenders.TMA),
    }
    _contest(bench, problem, makes, **sizes)


def _problem(bench: Bench, **sizes) -> Problem:
    nbytes = 2 * sizes["M"] * (sizes["K"] + sizes["N"])
    return Problem(device=bench.device, count=bench.copies(nbytes), **sizes)


def _contest(bench: Bench, problem: Problem, makes: dict[str, Make], **sizes) -> None:
    truth = problem.truth() if not problem.p else {}  # with dropout everyone has a mask of his own
    own = own_storages(problem.linear) | {x.untyped_storage().data_ptr() for x in problem.xs}

    def make(name: str) -> Entry:
        made = makes[name](problem)
        call, about = made.step(problem), {}
        if truth and name != "frozen":
            errors = made.errors(problem, truth)
            outer, factor = GATES[problem.dtype]
            gates = {"y": outer, "dx": outer, "A": factor, "B": factor}
            about["error"] = max(errors.values())
            if name.startswith("ours"):  # the others may be as wrong as they are
                about["ok"] = all(value <= gates[key] for key, value in errors.items())
        call(0)
        about["peak_bytes"] = peak(bench, lambda: call(0))
        factors = {f.untyped_storage().data_ptr() for f in made.factors.values()}
        if name != "peft_compiled":
            kept = kept_bytes(made.forward, problem.xs[0], own | factors)
            about["kept_bytes_a_token"] = kept / problem.M
        return Entry(call, about)

    flops = 4.0 * problem.M * problem.N * problem.K
    bench.contest(
        "layer", {name: partial(make, name) for name in makes}, "frozen", flops=flops, **sizes
    )


def peak(bench: Bench, step: Callable[[], object]) -> int:
    """Bytes that a step takes at most beyond what is held before it; 0 on a CPU."""
    if bench.device != "cuda":
        return 0
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held
