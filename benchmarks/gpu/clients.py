"""One step of C clients on a model of RoBERTa-large's shape: one after another, operation by
operation and by a CUDA graph, and together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Entry, Unit
from benchmarks.gpu.layer import peak
from benchmarks.gpu.sizes import Sizes
from rolora.federated.client import LocalTrainer
from rolora.federated.cuda_graphs import Capturer, Graphs, Stream

_GATE = 1e-2  # of bf16 changes, by a graph and without


def units(sizes: Sizes) -> Iterator[Unit]:
    for count in sizes.clients:
        run = partial(_cohort, count=count, sizes=sizes)
        yield Unit(f"cohort clients={count}", run, limit=120)


def _cohort(bench: Bench, count: int, sizes: Sizes) -> None:
    from benchmarks.cohort import engines, shaped

    trainer, heads = shaped(sizes.roberta, *sizes.roberta_batch, bench.device)
    calls, tokens, _ = engines((trainer, heads), count)
    captured = engines((_captured(trainer, bench.device), heads), count)[0]["sequential"]
    calls = {"sequential": calls["sequential"], "graphs": captured, "batched": calls["batched"]}
    _check(bench, trainer, heads, count)

    def make(name: str) -> Entry:
        call = calls[name]
        for _ in range(3):  # the third captures
            call()
        return Entry(lambda i: call(), {"peak_bytes": peak(bench, call), "tokens": tokens()})

    makes = {name: partial(make, name) for name in calls}
    bench.contest("cohort", makes, "sequential", rounds=3, inner=1, clients=count)


def _captured(trainer: LocalTrainer, device: str) -> LocalTrainer:
    """The same trainer by graphs."""
    parameters = trainer.layout.trainable(trainer.model)
    capturer: Capturer = Stream(torch.device("cuda", 0)) if device == "cuda" else _OnHost()
    graphs = Graphs(trainer.model, trainer.recipe, parameters, capturer, print)
    return replace(trainer, backward=graphs)


class _OnHost:
    """Does again what it was given, for a `--smoke` without a GPU."""

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        loss = torch.zeros(())
        return lambda: loss.copy_(work()), loss


def _check(bench: Bench, trainer: LocalTrainer, heads: list[str], count: int) -> None:
    """A row that says how far what clients send by a graph is from what they send without. By SGD
    without clipping, whose change is the gradient: AdamW's first step has its signs alone.
    """
    from benchmarks.cohort import engines

    config = replace(trainer.config, optimizer="sgd", max_grad_norm=0.0)
    plain = replace(trainer, config=config)

    def changes(who: LocalTrainer) -> Tensor:
        call = engines((who, heads), count)[0]["sequential"]
        for _ in range(3):  # the third is captured
            updates = call()
        return torch.stack([update.change for _, update, _ in updates]).float()

    def error() -> float:
        wanted = changes(plain)
        return float((changes(_captured(plain, bench.device)) - wanted).norm() / wanted.norm())

    found = bench.attempt("check", "graphs", error, ok=False, clients=count)
    if isinstance(found, float):
        bench.add("check", name="graphs", ok=found <= _GATE, error=found, clients=count)
