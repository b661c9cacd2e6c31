"""Packing, and sums whose bits do not depend on order."""

import math
import os

import numpy as np
import pytest
import torch

from rolora_kernels import use_backend
from rolora_kernels.codecs import CODECS, Rounded
from rolora_kernels.exact_sum import ExactSum
from rolora_kernels.exchange import pack, pack_change, unpack

BLOCKS = {"int8": (256, 127, 1.0), "int4": (128, 7, 0.5)}  # values of a scale, steps, bytes each
TYPES = {
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
    **{"int8": torch.uint8, "int4": torch.int8},
}
BACKENDS = ["torch", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch"]


def wide_range(size, seed):
    """fp32 values of both signs spread over 2**±20."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        (rng.choice([-1.0, 1.0], size) * np.exp2(rng.uniform(-20, 20, size))).astype(np.float32)
    )


def test_every_order_and_grouping_gives_the_same_bits_where_floats_do_not():
    size, clients = 1 << 20, 12
    terms = [(wide_range(size, seed), 10 + seed) for seed in range(clients)]
    orders = [
        range(clients),
        range(clients - 1, -1, -1),
        np.random.default_rng(0).permutation(clients),
    ]
    means, floats = [], []
    for order in orders:
        total = ExactSum(size, 2.0**20, 100, clients)
        naive = torch.zeros(size, dtype=torch.float64)
        for i in order:
            total.add(*terms[i])
            naive += terms[i][0].double() * terms[i][1]
        means.append(total.mean())
        floats.append(naive)
    assert all(torch.equal(means[0], mean) for mean in means[1:])
    assert not all(torch.equal(floats[0], f) for f in floats[1:]), (
        "the data must be hard enough to tell fp64 sums apart"
    )


@pytest.mark.parametrize("clients", [2, 10, 100, 1000])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_mean_against_exact_arithmetic(clients, dtype):
    rng = np.random.default_rng(clients)
    drawn = torch.from_numpy(rng.normal(0, 1e-3, (clients, 64)).astype(np.float32))
    codec = CODECS[dtype]
    sent = [codec.encode(change, key) for key, change in enumerate(drawn)]
    changes = torch.stack([codec.decode(wire) for wire in sent])
    weights = rng.integers(1, 5000, clients)
    total = ExactSum(64, 64.0, 5000, clients)
    for change, weight in zip(changes, weights, strict=True):
        total.add(change, int(weight))
    exact = [
        math.fsum(float(w) * float(v) for w, v in zip(weights, column, strict=True))
        / int(weights.sum())
        for column in changes.t().tolist()
    ]
    error = np.abs(total.mean().double().numpy() - exact) / np.sqrt(np.mean(np.square(exact)))
    assert error.max() < 1e-6


@pytest.mark.parametrize(
    "values, weight, message",
    [
        (torch.full((4,), 3.0), 1, "over the bound of 2"),
        (torch.tensor([0.0, float("nan"), 0.0, 0.0]), 1, "nan is over the bound"),
        (torch.tensor([0.0, float("inf"), 0.0, 0.0]), 1, "inf is over the bound"),
        (torch.zeros(4), 0, "from 1 to 10, got 0"),
        (torch.zeros(4), 11, "from 1 to 10, got 11"),
        (torch.zeros(4), 1.5, "must be an integer"),
        (torch.zeros(1), 1, r"expected \[4\] values, got \[1\]"),
    ],
)
def test_terms_beyond_the_bounds_leave_the_sum_alone(values, weight, message):
    total = ExactSum(4, 2.0, 10, 2)
    total.add(torch.full((4,), 1.5), 3)
    before = total.total.clone()
    with pytest.raises(ValueError, match=message):
        total.add(values, weight)
    assert torch.equal(total.total, before) and total.weight == 3
    torch.testing.assert_close(total.mean(), torch.full((4,), 1.5))


def test_the_largest_declared_sum_does_not_overflow():
    total = ExactSum(1, 64.0, 1 << 20, 1000)
    for _ in range(1000):
        total.add(torch.tensor([64.0]), 1 << 20)
    assert total.mean().item() == 64.0
    with pytest.raises(ValueError, match="more than the declared 1000"):
        total.add(torch.tensor([1.0]), 1)


def test_pack_and_unpack_are_inverse():
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 6).t()]
    flat = pack(tensors, torch.empty(29))
    again = [torch.empty(3, 4), torch.empty(5), torch.empty(6, 2)]
    unpack(flat, again)
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    with pytest.raises(ValueError, match="do not fill"):
        pack(tensors, torch.empty(30))
    with pytest.raises(ValueError, match="does not fill"):
        unpack(torch.empty(30), again)


def tensors_and_base(seed=0):
    torch.manual_seed(seed)
    tensors = [
        torch.randn(3, 100),
        torch.randn(1),
        torch.randn(700),
        torch.randn(50, 13).t(),
        torch.randn(2048),
    ]
    return tensors, [torch.randn(t.numel()) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_packed_change_is_the_rounded_difference(dtype, backend, poisoned_empty):
    tensors, base = tensors_and_base()
    truth = np.concatenate(
        [t.numpy().ravel() - b.numpy() for t, b in zip(tensors, base, strict=True)]
    )
    with use_backend(backend):
        wire, norm, bad = pack_change(tensors, base, CODECS[dtype])
        plain = pack_change(tensors, None, CODECS[dtype])
    assert torch.equal(wire, torch.from_numpy(truth).to(TYPES[dtype])) and bad == 0
    assert abs(norm / np.linalg.norm(truth.astype(np.float64)) - 1) < 1e-6
    assert torch.equal(plain.wire, torch.cat([t.reshape(-1) for t in tensors]).to(TYPES[dtype]))
    assert torch.equal(CODECS[dtype].encode(torch.from_numpy(truth)), wire)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", BLOCKS)
def test_integers_are_within_one_step_of_their_block_and_unbiased(dtype, backend):
    block, steps, each = BLOCKS[dtype]
    tensors, base = tensors_and_base()
    tensors[2][100:500] = base[2][100:500]  # blocks of zeros stay zeros
    change = np.concatenate(
        [t.numpy().ravel() - b.numpy() for t, b in zip(tensors, base, strict=True)]
    ).astype(np.float64)
    n, draws = len(change), 400 if backend == "torch" else 25
    padded = np.zeros(-(-n // block) * block)
    padded[:n] = change
    step = np.repeat(np.abs(padded.reshape(-1, block)).max(1) / steps, block)[:n]
    total, codec = np.zeros(n), CODECS[dtype]
    with use_backend(backend):
        for key in range(draws):
            wire, norm, bad = pack_change(tensors, base, codec, key)
            value = codec.decode(wire).numpy().astype(np.float64)
            assert (np.abs(value - change) <= step * (1 + 1e-5)).all() and bad == 0
            total += value
        assert torch.equal(
            pack_change(tensors, base, codec, 7).wire, pack_change(tensors, base, codec, 7).wire
        )
    assert (
        wire.dtype == TYPES[dtype]
        and len(wire) == math.ceil(each * n) + 4 * -(-n // block)
        and codec.values_in(wire) == n
    )
    assert abs(norm / np.linalg.norm(change) - 1) < 1e-6
    z = (total / draws - change)[step > 0] / (
        step[step > 0] * (0.25 / draws) ** 0.5
    )  # variance of a step is at most 1/4
    assert abs(z.mean()) < 5 / len(z) ** 0.5 and np.abs(z).max() < 6 and z.var() < 1.1
    assert z.var() > 0.3, "rounding to nearest would have no variance"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_cannot_travel_are_counted(dtype, backend):
    tensors, base = tensors_and_base()
    tensors[0][1, 5], tensors[4][2000], tensors[2][3] = math.nan, -math.inf, 1e6
    with use_backend(backend):
        wire, norm, bad = pack_change(tensors, base, CODECS[dtype])
    assert bad == (3 if dtype == "fp16" else 2) and not math.isfinite(norm)
    assert not CODECS[dtype].decode(wire).isfinite().all()


def test_a_large_change_is_packed_without_a_temporary_of_its_size():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {
                t.untyped_storage().data_ptr()
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    self.made = max(self.made, t.untyped_storage().nbytes())
            return result

    tensors = [torch.randn(1 << 22) for _ in range(4)]
    base = [t + 1e-3 for t in tensors]
    for dtype in TYPES:
        out = torch.empty(CODECS[dtype].length(1 << 24), dtype=TYPES[dtype])
        with Largest() as largest:
            pack_change(tensors, base, CODECS[dtype], out=out)
        assert 0 < largest.made <= 1 << 22, "a sixteenth of the 64 MiB of the change"
    with pytest.raises(
        ValueError, match=r"out is torch.int8 \[8912896\], expected torch.float32 \[16777216\]"
    ):
        pack_change(tensors, base, CODECS["fp32"], out=out)
    with pytest.raises(ValueError, match="published holds 5 values for a tensor of 4194304"):
        pack_change(tensors[:1], [torch.zeros(5)], CODECS["fp32"])


@pytest.mark.parametrize("n", [0, 1, 2, 127, 129, 255, 256, 257, 70_000, 131_073])
@pytest.mark.parametrize("dtype", TYPES)
def test_adding_a_decoded_change_is_one_rounding(dtype, n):
    change, published, codec = torch.randn(n) * 0.01, torch.randn(n), CODECS[dtype]
    wire = codec.encode(change, key=3)
    assert torch.equal(pack_change([change], None, codec, key=3).wire, wire)
    assert codec.values_in(wire) == n and len(codec.decode(wire)) == n
    exact = published.double() + codec.decode(wire).double()
    assert torch.equal(codec.add(published, wire), exact.float())


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
def test_what_no_kernel_writes_is_packed_by_torch():
    fp8 = Rounded("fp8", torch.float8_e5m2)
    tensors, base = tensors_and_base()
    with use_backend("triton"):
        wire, _, bad = pack_change(tensors, base, fp8)
    change = torch.cat([t.reshape(-1) - b for t, b in zip(tensors, base, strict=True)])
    assert bad == 0 and torch.equal(wire.float(), change.to(torch.float8_e5m2).float())


def test_impossible_int8_buffers_are_told():
    for length in (1, 4, 260 + 4):
        with pytest.raises(ValueError, match=f"{length} bytes are no int8 buffer"):
            CODECS["int8"].decode(torch.zeros(length, dtype=torch.uint8))


def test_int4_bytes_by_hand():
    """Steps of 1: 3 and −7 in a byte, 7 alone in the next, beside the −8 that says it is."""
    wire = CODECS["int4"].encode(torch.tensor([3.0, -7.0, 7.0]), key=1)
    assert wire[:4].view(torch.float32).item() == 1.0
    assert [byte & 255 for byte in wire[4:].tolist()] == [0x93, 0x87]
    for length in (1, 4, 68 + 4):
        with pytest.raises(ValueError, match=f"{length} bytes are no int4 buffer"):
            CODECS["int4"].decode(torch.zeros(length, dtype=torch.int8))


def test_partial_sums_are_one_sum_bit_for_bit():
    """What ranks do: each sums its own clients, and all take over the sum of the partial sums."""
    generator = torch.Generator().manual_seed(3)
    scales = 2.0 ** torch.arange(-10, -1)[:, None]
    changes = torch.randn(9, 1000, generator=generator) * scales
    weights = [1, 5, 2, 7, 3, 4, 6, 2, 1]
    whole = ExactSum(1000, 64.0, 7, 9)
    parts = [ExactSum(1000, 64.0, 7, 9) for _ in range(3)]
    for number, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        whole.add(change, weight)
        parts[number % 3].add(change, weight)
    total = sum(part.partial() for part in parts)
    for part in parts:
        part.replace(total)
        assert torch.equal(part.mean(), whole.mean()) and part.terms == 9
    with pytest.raises(ValueError, match="27 terms are over the declared 9"):
        parts[0].replace(3 * total)
