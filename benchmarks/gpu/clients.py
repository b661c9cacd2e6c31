"""One step of C clients on a model of RoBERTa-large's shape: one after another, and together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.layer import peak
from benchmarks.gpu.sizes import Sizes


def units(sizes: Sizes) -> Iterator[Unit]:
    for count in sizes.clients:
        run = partial(_cohort, count=count, sizes=sizes)
        yield Unit(f"cohort clients={count}", run, limit=120)


def _cohort(bench: Bench, count: int, sizes: Sizes) -> None:
    from benchmarks.cohort import engines, shaped

    made = shaped(sizes.roberta, *sizes.roberta_batch, bench.device)
    calls, tokens, _ = engines(made, count)

    def make(name: str) -> Entry:
        call = calls[name]
        call()
        return Entry(lambda i: call(), {"peak_bytes": peak(bench, call), "tokens": tokens()})

    makes = {name: partial(make, name) for name in calls}
    bench.contest("cohort", makes, "sequential", rounds=3, inner=1, clients=count)
