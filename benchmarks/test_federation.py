"""A round of the built-in job, and what its exchange costs: messages packed and read, changes
summed.
"""

import pytest
import torch

from benchmarks.interleave import interleaved, report
from rolora import config
from rolora.federated import wire
from rolora.hf.shelf import Shelf
from rolora.run import job
from rolora.run.federation import build_server
from rolora_kernels.codecs import CODECS
from rolora_kernels.exact_sum import ExactSum
from rolora_kernels.exchange import pack_change, unpack


@pytest.fixture(scope="module")
def rounds():
    """Times of one round of 10 clients (training, messages, sum; no evaluation) by every method."""
    shelf = Shelf()

    def one(method, number):
        made = job.prepare(config.resolve({"method": method}, preset="builtin"), shelf)
        server = build_server(made, on_round=lambda row: None)
        return lambda: server._round(number)

    return interleaved(
        {
            "rolora_B": one("rolora", 1),
            "rolora_A": one("rolora", 2),
            "fedavg": one("fedavg", 1),
            "flexlora": one("flexlora", 1),
        },
        pairs=5,
    )


@pytest.mark.parametrize("contender", ["rolora_B", "rolora_A", "fedavg", "flexlora"])
def test_round_of_the_builtin_job(benchmark, rounds, contender):
    benchmark.group = "round of the built-in job, 10 clients"
    report(benchmark, rounds, contender, base="rolora_B")


@pytest.fixture(scope="module")
def exchange():
    """3 MiB a factor in bf16, as Llama-2-7B's layers 26 to 31 at rank 8 have it, beside a plain
    fp32 copy of as many values.
    """
    size = 8 * 4096 * 4 * 6
    change = (torch.randn(size) * 1e-3).bfloat16()
    full = change.float()
    update = wire.Update("r", 1, "B", 0, "l", {"A": 0, "B": 0}, 100, 1.0, 30, 900, change)
    message = wire.encode_update(update)
    total = ExactSum(size, 64.0, 1000, 1 << 20)
    target = torch.empty_like(full)
    return interleaved(
        {
            "fp32_copy": lambda: target.copy_(full),
            "encode": lambda: wire.encode_update(update),
            "decode": lambda: wire.decode_update(message, 1 << 30),
            "exact_sum": lambda: total.add(full, 100),
        }
    )


@pytest.mark.parametrize("contender", ["fp32_copy", "encode", "decode", "exact_sum"])
def test_exchange(benchmark, exchange, contender):
    benchmark.group = "exchange of 786,432 values in bf16"
    report(benchmark, exchange, contender, base="fp32_copy")


@pytest.fixture(scope="module")
def packing():
    """10⁸ values in 100 tensors, as their change from what is published: to the wire (one buffer
    used again), and from it.
    """
    size = 10**8
    tensors, base = (
        [torch.randn(10**6) for _ in range(100)],
        [torch.randn(10**6) for _ in range(100)],
    )
    source, target = torch.cat(base), torch.zeros(size)
    wires = {
        name: torch.zeros(codec.length(size), dtype=codec.dtype) for name, codec in CODECS.items()
    }
    calls = {
        f"pack_{name}": lambda name=name, codec=codec: pack_change(
            tensors, base, codec, 1, wires[name]
        )
        for name, codec in CODECS.items()
    }
    calls |= {
        "fp32_copy": lambda: target.copy_(source),
        "unpack_fp32": lambda: unpack(source, tensors),
    }
    return interleaved(calls, pairs=7)


@pytest.mark.parametrize(
    "contender", ["fp32_copy", "pack_fp32", "pack_bf16", "pack_fp16", "pack_int8", "unpack_fp32"]
)
def test_packing(benchmark, packing, contender):
    benchmark.group = "packing 10^8 values"
    report(benchmark, packing, contender, base="fp32_copy")
