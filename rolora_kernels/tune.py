"""Makes the rows of a table (tuned): who computes a primitive fastest at a shape, and how.

A primitive's candidates are the vendor library and every kernel whose SPEC names it. Each of our
candidates is timed as shipped and in the best configuration of its grid; one that disagrees with
float64 is thrown out before it is timed. Time is the caller's to measure: `python -m
benchmarks.gpu` has a Bench, and writes the tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rolora_kernels import lora_linear, torch_ops, triton_ops, use_backend
from rolora_kernels.dropout import Dropout
from rolora_kernels.plan import MASKED, RULE, Plan
from rolora_kernels.triton_ops.descriptors import why_not
from rolora_kernels.triton_ops.spec import Spec, all_specs

GATE = 4e-3  # relative error beyond which a bf16 configuration is wrong
WORTH = 0.98  # of the vendor's time: what a candidate has to stay below to win
KEPT = 8  # configurations of a candidate that are tried again at the next shape


class Bench(Protocol):
    """What measures, and keeps what goes wrong."""

    def time(self, call: Callable, inner: int) -> float:
        """Milliseconds of a call, the mean of `inner`."""

    def interleaved(
        self, calls: dict[str, Callable], *, tables: dict[str, list[dict]]
    ) -> dict[str, list[float]]:
        """Milliseconds of every call, round after round; during a call named in `tables` dispatch
        follows those rows.
        """

    def use_table(self, rows: list[dict]) -> None:
        """From now on dispatch follows these rows."""

    def add(self, part: str, **values) -> None:
        """Keeps a row of results."""


def primitives() -> list[str]:
    """The primitives, those that only walk over memory first: they gain most."""
    specs = all_specs()
    order = sorted(RULE, key=lambda name: len(specs[name].sizes))
    order.insert(0, order.pop(order.index("grads_of_dy")))  # it gains most of all
    return order


def candidates(name: str) -> dict[str, Spec]:
    """implementation → SPEC of every kernel of ours that computes a primitive."""
    specs = [spec for spec in all_specs().values() if name in spec.primitives]
    specs.sort(key=lambda spec: spec.implementation == "tma")
    return {spec.implementation: spec for spec in specs}


def grids() -> dict[tuple[str, str], Sequence[Mapping[str, int]]]:
    """(primitive, candidate) → the configurations to try."""
    return {
        (name, candidate): spec.grid
        for name in primitives()
        for candidate, spec in candidates(name).items()
    }


def operands(device: str, M: int, K: int, N: int, r: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random operands of every primitive, scaled so that results are about one."""
    make = partial(torch.randn, device=device, dtype=torch.float32)
    raw = {
        "x": make(M, K),
        "W": make(N, K) / K**0.5,
        "A": make(r, K) / K**0.5,
        "B": make(N, r) / r**0.5,
        "dy": make(M, N),
    }
    t = {name: value.to(dtype) for name, value in raw.items()}
    t["S"] = (t["x"].float() @ t["A"].float().t()).to(dtype)
    t["T"] = (t["dy"].float() @ t["B"].float()).to(dtype)
    return t


def call(
    name: str, candidate: str, t: dict[str, Tensor], dropout: Dropout | None = None
) -> list[Tensor]:
    """One call of a primitive on `t` by "torch" or one of our candidates; a list of its results."""
    ops = torch_ops if candidate == "torch" else triton_ops
    which = {"tma": True} if candidate == "tma" else {}
    call = all_specs()[name].call
    assert call is not None, f"{name} is no primitive that tune calls"
    return call(ops, t, dropout, **which)


def fits(candidate: str, t: dict[str, Tensor]) -> bool:
    """Whether a candidate can compute on these operands."""
    W = t["W"]
    return candidate != "tma" or why_not(W.device, W.dtype, *W.shape) is None


def truth(name: str, t: dict[str, Tensor], dropout: Dropout | None = None) -> list[Tensor]:
    """What a primitive gives in float64."""
    return call(name, "torch", {key: value.double() for key, value in t.items()}, dropout)


def error(results: list[Tensor], truths: list[Tensor]) -> float:
    """The largest relative RMS error of a call's results."""
    return max(
        ((value.double() - true).pow(2).mean() / true.pow(2).mean()).sqrt().item()
        for value, true in zip(results, truths, strict=True)
    )


def empty_row(name: str, t: dict[str, Tensor], dropout: Dropout | None = None) -> dict:
    """The row of a table for these operands, before anything has won."""
    spec = all_specs()[name]
    (M, K), (N, r) = t["x"].shape, t["B"].shape
    return {
        "primitive": name,
        "dtype": str(t["x"].dtype).removeprefix("torch."),
        "rank": spec.rank_block(r),
        "sizes": [{"M": M, "N": N, "K": K}[letter] for letter in spec.sizes],
        "dropout": dropout is not None,
        "winner": "torch",
        "configs": {},
    }


def measure(
    bench: Bench, name: str, t: dict[str, Tensor], grid: dict, dropout: Dropout | None = None
) -> tuple[dict, dict[str, list[float]]]:
    """(row, milliseconds of every call) of a primitive on `t`, by the candidates that `grid` names;
    the fastest configurations are left there for the next shape: give one grid to what has dropout
    and another to what has none. A primitive that dropout does not act in has no row with it:
    ValueError.
    """
    if dropout is not None and name not in MASKED:
        raise ValueError(f"dropout acts in {', '.join(MASKED)} alone, not in {name}")
    row, truths = empty_row(name, t, dropout), truth(name, t, dropout)
    calls: dict[str, Callable] = {"torch": partial(call, name, "torch", t, dropout)}
    for candidate in candidates(name):
        if (name, candidate) not in grid or not fits(candidate, t):
            continue
        ours = partial(call, name, candidate, t, dropout)
        timed = search(bench, row, candidate, ours, truths, grid[name, candidate])
        grid[name, candidate] = timed[:KEPT]
        calls[candidate] = ours
        if timed:
            row["configs"][candidate] = dict(timed[0])
            calls[f"{candidate} tuned"] = ours
    tables = {f"{candidate} tuned": [row] for candidate in row["configs"]}
    times = bench.interleaved(calls, tables=tables)
    ratios = {
        candidate: faster_than(times[f"{candidate} tuned"], times["torch"])
        for candidate in row["configs"]
    }
    if ratios and min(ratios.values()) < WORTH:
        row["winner"] = min(ratios, key=lambda candidate: ratios[candidate])
    return row, times


def search(
    bench: Bench,
    row: dict,
    candidate: str,
    ours: Callable[[], list[Tensor]],
    truths: list[Tensor],
    configs: Sequence[Mapping[str, int]],
) -> list[Mapping[str, int]]:
    """The configurations that compute what is true, the fastest first."""
    timed = []
    for config in configs:
        bench.use_table([row | {"configs": {candidate: config}}])
        try:
            if error(ours(), truths) <= GATE:
                timed.append((min(bench.time(ours, 3) for _ in range(3)), config))
        except Exception as problem:  # too much shared memory, say
            bench.add(
                "config",
                name=row["primitive"],
                candidate=candidate,
                sizes=str(row["sizes"]),
                config=str(config),
                problem=str(problem).splitlines()[0][:120],
            )
    timed.sort(key=lambda pair: pair[0])
    return [config for _, config in timed]


def faster_than(times: list[float], base: list[float]) -> float:
    """The median of a call's time over that of another in the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def measure_merged(
    bench: Bench, t: dict[str, Tensor], plan: Plan
) -> tuple[dict, dict[str, list[float]]]:
    """(row "merged", milliseconds of every call): a training step of phase B by `plan`, the best
    that primitives give at this shape, and by a merged weight that either maker makes.
    """
    row = empty_row("expand_base", t) | {"primitive": "merged", "winner": "none"}
    plans = {"rule": plan}
    for maker in ("torch", "triton"):
        plans[maker] = replace(plan, expand_base="torch", base_dx="torch", merge=maker, merged=True)
    x, B = t["x"].detach().requires_grad_(), t["B"].float().requires_grad_()

    def step(name: str) -> None:
        with use_backend(plans[name]):
            y = lora_linear(x, t["W"], t["A"].float(), B, 1.3)
            torch.autograd.grad(y, (x, B), t["dy"])

    times = bench.interleaved({name: partial(step, name) for name in plans}, tables={})
    ratios = {maker: faster_than(times[maker], times["rule"]) for maker in ("torch", "triton")}
    best = min(ratios, key=lambda maker: ratios[maker])
    if ratios[best] < WORTH:
        row["winner"] = best
    return row, times
