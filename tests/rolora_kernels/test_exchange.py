"""Packing, and sums whose bits do not depend on order."""

import math

import numpy as np
import pytest
import torch

from rolora_kernels.exchange import ExactSum, pack, unpack


def wide_range(size, seed):
    """fp32 values of both signs spread over 2**±20."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.choice([-1.0, 1.0], size) * np.exp2(rng.uniform(-20, 20, size))).astype(np.float32))


def test_every_order_and_grouping_gives_the_same_bits_where_floats_do_not():
    size, clients = 1 << 20, 12
    terms = [(wide_range(size, seed), 10 + seed) for seed in range(clients)]
    orders = [range(clients), range(clients - 1, -1, -1), np.random.default_rng(0).permutation(clients)]
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
    assert not all(torch.equal(floats[0], f) for f in floats[1:]), "the data must be hard enough to tell fp64 sums apart"


@pytest.mark.parametrize("clients", [2, 10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mean_against_exact_arithmetic(clients, dtype):
    rng = np.random.default_rng(clients)
    changes = torch.from_numpy(rng.normal(0, 1e-3, (clients, 64)).astype(np.float32)).to(dtype).float()
    weights = rng.integers(1, 5000, clients)
    total = ExactSum(64, 64.0, 5000, clients)
    for change, weight in zip(changes, weights, strict=True):
        total.add(change, int(weight))
    exact = [math.fsum(float(w) * float(v) for w, v in zip(weights, column, strict=True)) / int(weights.sum())
             for column in changes.t().tolist()]
    error = np.abs(total.mean().double().numpy() - exact) / np.sqrt(np.mean(np.square(exact)))
    assert error.max() < 1e-6


@pytest.mark.parametrize("values, weight, message", [
    (torch.full((4,), 3.0), 1, "over the bound of 2"),
    (torch.tensor([0.0, float("nan"), 0.0, 0.0]), 1, "nan is over the bound"),
    (torch.tensor([0.0, float("inf"), 0.0, 0.0]), 1, "inf is over the bound"),
    (torch.zeros(4), 0, "from 1 to 10, got 0"),
    (torch.zeros(4), 11, "from 1 to 10, got 11"),
    (torch.zeros(4), 1.5, "must be an integer"),
    (torch.zeros(1), 1, r"expected \[4\] values, got \[1\]"),
])
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
