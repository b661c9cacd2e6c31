"""A layer's forward and backward: frozen linear, PEFT default, PEFT with the phase's factor frozen,
ours.
"""

import functools

import pytest
import torch

from benchmarks.interleave import interleaved, report
from benchmarks.layers import CONTENDERS, contenders

SHAPES = [(2048, 1024, 1024, 8), (2048, 2048, 2048, 16), (4096, 1024, 4096, 8)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.lru_cache(maxsize=1)
def measured(shape, dtype, phase, dropout=0.0):
    torch.manual_seed(0)
    steps, kept = contenders(*shape, DTYPES[dtype], phase, dropout=dropout)
    return interleaved(steps), {name: count() for name, count in kept.items()}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_layer_step(benchmark, shape, dtype, phase, contender):
    times, kept = measured(shape, dtype, phase)
    benchmark.group = f"layer {'x'.join(map(str, shape))} {dtype} phase {phase}"
    report(
        benchmark,
        times,
        contender,
        base="frozen",
        kept_bytes=kept[contender],
        bytes_a_token=kept[contender] / shape[0],
    )


@pytest.mark.parametrize("contender", ["frozen", "peft_phase", "ours"])
@pytest.mark.parametrize("phase", ["A", "B"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_layer_step_with_dropout(benchmark, shape, phase, contender):
    times, kept = measured(shape, "fp32", phase, dropout=0.05)
    benchmark.group = f"layer {'x'.join(map(str, shape))} fp32 dropout .05 phase {phase}"
    report(benchmark, times, contender, base="frozen", kept_bytes=kept[contender])
