"""Every primitive at the models' shapes: vendor libraries against our kernels over a grid of
configurations. The rows go into the table that dispatch follows from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from benchmarks.gpu import checks
from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.sizes import Sizes
from rolora_kernels import measured, tune
from rolora_kernels.dropout import Dropout
from rolora_kernels.plan import MASKED
from rolora_kernels.triton_ops.spec import all_specs

SKINNY = ("grads_of_dy", "shrink", "grad_A")
GEMMS = ("expand_base", "base_dx")


class Turning(dict):
    """Operands that are others from call to call: item `name` of the copy whose turn it is."""

    def __init__(self, made: list[dict[str, torch.Tensor]]):
        super().__init__(made[0])
        self.made = made

    def turn(self, i: int) -> None:
        self.update(self.made[i % len(self.made)])


class TuneBench:
    """The Bench that rolora_kernels.tune wants. `base`: what a contest's ratios are to; `rows`:
    what dispatch follows in it, for calls that name no rows of their own.
    """

    def __init__(
        self, bench: Bench, operands: Turning, about: dict, base: str = "torch", rows: Sequence = ()
    ):
        self.bench, self.operands, self.about = bench, operands, about
        self.base, self.rows = base, list(rows)

    def _call(self, call: Callable[[], object]) -> Callable[[int], object]:
        def turned(i: int) -> object:
            self.operands.turn(i)
            return call()

        return turned

    def time(self, call: Callable[[], object], inner: int) -> float:
        try:
            return self.bench.clock.sample(self._call(call), inner).ms
        finally:
            self.operands.turn(0)  # what is compared with the truth

    def interleaved(
        self, calls: Mapping[str, Callable[[], object]], *, tables: Mapping[str, list[dict]]
    ) -> dict[str, list[float]]:
        entries = {name: Entry(self._call(call)) for name, call in calls.items()}
        makes = {name: (lambda entry=entry: entry) for name, entry in entries.items()}
        follow = {name: tables.get(name, self.rows) for name in calls}
        times = self.bench.contest("primitive", makes, self.base, tables=follow, **self.about)
        return {name: [sample.ms for sample in samples] for name, samples in times.items()}

    def use_table(self, rows: list[dict]) -> None:
        self.bench.note("a configuration")
        self.bench.use_table(rows)

    def add(self, part: str, **values) -> None:
        self.bench.add(part, **values)


def units(sizes: Sizes, names: tuple[str, ...]) -> Iterator[Unit]:
    """A check of each primitive, then its row for every linear."""
    for name in names:
        yield checks.unit(name, sizes)
        for N, K in sizes.linears:
            yield _unit(name, N, K, sizes.rank, sizes)


def merged_units(sizes: Sizes) -> Iterator[Unit]:
    """Whether a merged weight wins over the best that the primitives give."""
    for N, K in sizes.linears:
        run = partial(_merged, N=N, K=K, sizes=sizes)
        yield Unit(f"primitive merged M={sizes.M} N={N} K={K} r={sizes.rank}", run, limit=90)


def masked_units(sizes: Sizes) -> Iterator[Unit]:
    """Rows with dropout, which those without it say nothing about."""
    for name in (*SKINNY, *GEMMS):
        if name in MASKED:
            for N, K in sizes.linears[:1]:
                yield _unit(name, N, K, sizes.rank, sizes, p=0.05)


def more_units(sizes: Sizes) -> Iterator[Unit]:
    """Rows for a high rank, by what was fastest at the first one."""
    for name in (*SKINNY, *GEMMS):
        for N, K in sizes.linears:
            yield _unit(name, N, K, sizes.other_ranks[-1], sizes)


def tma_units(sizes: Sizes) -> Iterator[Unit]:
    """The frozen products on TMA, against the winner so far."""
    for name in GEMMS:
        yield checks.unit(name, sizes, tma=True)
        for N, K in sizes.linears:
            yield _unit(name, N, K, sizes.rank, sizes, tma=True)


def _unit(
    name: str, N: int, K: int, r: int, sizes: Sizes, tma: bool = False, p: float = 0.0
) -> Unit:
    kind, masked = "tma " if tma else "", f" p={p}" if p else ""
    run = partial(_tune, name=name, N=N, K=K, r=r, sizes=sizes, tma=tma, p=p)
    return Unit(f"primitive {kind}{name} M={sizes.M} N={N} K={K} r={r}{masked}", run, limit=90)


def _tune(
    bench: Bench, name: str, N: int, K: int, r: int, sizes: Sizes, tma: bool, p: float
) -> None:
    M, spec = sizes.M, all_specs()[name]
    moved = spec.traffic(M, N, K, r) if spec.traffic else 0
    operands = _operands(bench, M, N, K, r, moved)
    about = {"primitive": name, "M": M, "N": N, "K": K, "r": r, "p": p, "moved": float(moved)}
    if name in GEMMS:
        about["flops"] = 2.0 * M * N * K
    grid = _grid(name, bench.results.rows, sizes, tma, p)
    dropout = Dropout(p, torch.tensor(7, device=bench.device)) if p else None
    row, _ = tune.measure(TuneBench(bench, operands, about), name, operands, grid, dropout)
    fastest = {candidate: list(configs) for (_, candidate), configs in grid.items()}
    _keep(bench, row, N=N, K=K, r=r, p=p, fastest=fastest)


def _merged(bench: Bench, N: int, K: int, sizes: Sizes) -> None:
    """The whole rule by the table so far, against a merged weight."""
    M, r = sizes.M, sizes.rank
    operands = _operands(bench, M, N, K, r, 2 * M * (N + K))
    rows = [row for row in bench.results.tuned if row["primitive"] != "merged"]
    bench.use_table(rows)
    plan, _ = measured.plan_for(operands["x"], [operands["W"]], (r,), False)
    about = {"primitive": "merged", "M": M, "N": N, "K": K, "r": r, "plan": str(plan)}
    row, _ = tune.measure_merged(TuneBench(bench, operands, about, "rule", rows), operands, plan)
    _keep(bench, row, N=N, K=K, r=r, plan=str(plan))


def _operands(bench: Bench, M: int, N: int, K: int, r: int, moved: int) -> Turning:
    make = partial(tune.operands, bench.device, M, K, N, r, torch.bfloat16)
    return Turning([make() for _ in range(bench.copies(moved))])


def _keep(bench: Bench, row: dict, **about) -> None:
    """A row of the table, in the place of one for the same."""
    tuned = bench.results.tuned
    same = ("primitive", "dtype", "rank", "sizes", "dropout")
    tuned[:] = [old for old in tuned if any(old.get(key) != row[key] for key in same)] + [row]
    config = str(row["configs"].get(row["winner"], ""))
    bench.add("winner", name=row["primitive"], winner=row["winner"], config=config, **about)


def _grid(name: str, rows: list[dict], sizes: Sizes, tma: bool, p: float) -> dict:
    """What to try: after the first shape only what was fastest there. Beside TMA our other kernel
    has only its best configuration to defend.
    """
    grid = {}
    won = [
        row["fastest"]
        for row in rows
        if row["part"] == "winner" and (row.get("name"), row.get("p")) == (name, p)
    ]
    for (primitive, candidate), configs in tune.grids().items():
        if primitive != name or (candidate == "tma" and not tma):
            continue
        before = [fastest[candidate] for fastest in won if fastest.get(candidate)]
        if before:
            configs = before[-1][:1] if tma and candidate != "tma" else before[0]
        grid[name, candidate] = list(configs)[: sizes.configs]
    return grid
