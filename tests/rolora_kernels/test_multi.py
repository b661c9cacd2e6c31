"""Many adapters in one step: every adapter against NumPy float64 and PEFT on its own rows alone."""

import numpy as np
import pytest
import torch
from torch import nn

from rolora_kernels import (
    AdapterRows,
    BackendUnavailable,
    explain,
    grouped_lora_linear,
    multi_lora_linear,
    use_backend,
)
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.weights import Int8
from tests.rolora_kernels.judges import GATES, Kept, numpy_judge, problem, rms

K, N = 40, 56
RANKS = (4, 1, 8, 3)
SCALINGS = (0.7, 2.0, 0.5, 1.3)
# rows of four adapters and of none; the second adapter is absent, as adapters of a batch are
COUNTS = {"ragged": ((70, 0, 9, 1), 6), "one adapter": ((0, 0, 33, 0), 0), "none": ((0,) * 4, 5)}


def factors(dtype, phase):
    """As of each adapter, Bs of each, with what trains in a phase."""
    As = [torch.randn(r, K) / K**0.5 for r in RANKS]
    Bs = [torch.randn(N, r) / r**0.5 for r in RANKS]
    for factor in {"A": As, "B": Bs, "BOTH": As + Bs}[phase]:
        factor.requires_grad_()
    return As, Bs


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_every_adapter_is_what_numpy_says_of_its_own_rows(
    order, counts, phase, p, dtype, poisoned_empty
):
    """Ranks and scalings differ, an adapter is absent, and rows of no adapter are the base's."""
    counts, unadapted = COUNTS[counts]
    M = sum(counts) + unadapted
    index = torch.tensor([*range(4), -1]).repeat_interleave(torch.tensor([*counts, unadapted]))
    if order == "shuffled":
        index = index[torch.randperm(M)]
    rows = AdapterRows.by_index(index, 4)
    assert rows.counts == counts and rows.unadapted == unadapted
    x, W, _, _, bias, dy = problem(M, K, N, 1, dtype)
    As, Bs = factors(dtype, phase)
    xs = x.clone().requires_grad_()
    y = multi_lora_linear(
        xs, W, As, Bs, SCALINGS, bias, rows=rows, dropout_p=p, dropout_key=77 if p else None
    )
    y.backward(dy)
    mask = keep_mask(range(M), K, Dropout(p, torch.tensor(77))).double().numpy() / (1 - p)
    outer, factor = GATES[dtype]
    truths = {"y": np.zeros((M, N)), "dx": np.zeros((M, K))}
    for c in range(4):
        own = (index == c).numpy()
        truth = numpy_judge(
            x[own],
            W,
            As[c].detach().to(dtype).double().numpy(),
            Bs[c].detach().to(dtype).double().numpy(),
            SCALINGS[c],
            bias,
            dy[own],
            mask[own],
        )
        for name, whole in truths.items():
            whole[own] = truth[name]
        for name, f in (("dA", As[c]), ("dB", Bs[c])):
            if not f.requires_grad:
                assert f.grad is None
            elif not own.any():
                assert torch.equal(f.grad, torch.zeros_like(f))
            else:
                assert rms(f.grad, truth[name]) <= factor
    none = (index < 0).numpy()
    base = x[none].double().numpy() @ W.double().numpy().T + bias.double().numpy()
    truths["y"][none], truths["dx"][none] = base, dy[none].double().numpy() @ W.double().numpy()
    assert rms(y, truths["y"]) <= outer and rms(xs.grad, truths["dx"]) <= outer


def test_a_step_is_a_loop_over_pefts_layers():
    """The judge is PEFT: a model an adapter, each run on its own sequences."""
    import peft

    batch, length, index = 6, 5, [2, 0, -1, 2, 0, 2]
    linear = nn.Linear(K, N).requires_grad_(False)
    layers = []
    for r in RANKS:
        config = peft.LoraConfig(r=r, lora_alpha=3 * r, target_modules=["q"])
        layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"q": linear}))["q"]
        nn.init.normal_(layer.lora_B["default"].weight)
        layers.append(layer)
    As = [layer.lora_A["default"].weight.detach().clone().requires_grad_() for layer in layers]
    Bs = [layer.lora_B["default"].weight.detach().clone().requires_grad_() for layer in layers]
    x, dy = torch.randn(batch, length, K), torch.randn(batch, length, N)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    rows = AdapterRows.by_index(index, 4)  # an adapter a sequence
    y = multi_lora_linear(ours, linear.weight, As, Bs, 3.0, linear.bias, rows=rows)
    y.backward(dy)
    for number, adapter in enumerate(index):
        module = linear if adapter < 0 else layers[adapter]
        single = module(theirs[number])
        torch.testing.assert_close(y[number], single, rtol=1e-5, atol=1e-5)
        single.backward(dy[number])
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    for adapter, layer in enumerate(layers):
        for name, own in (("lora_A", As[adapter]), ("lora_B", Bs[adapter])):
            grad = getattr(layer, name)["default"].weight.grad
            if adapter in index:
                torch.testing.assert_close(own.grad, grad, rtol=1e-5, atol=1e-4)
            else:
                assert grad is None and torch.equal(own.grad, torch.zeros_like(own))


def test_gradients_match_finite_differences_in_any_order():
    x, W, _, _, bias, _ = problem(9, 7, 6, 2, torch.float64)
    A, B = torch.randn(3, 2, 7).double(), torch.randn(3, 6, 2).double()
    for index in ([0, 0, 0, 1, 1, 2, -1, -1, -1], [2, 0, -1, 0, 1, 2, -1, 0, 0]):
        rows = AdapterRows.by_index(index, 3)
        for p in (0.0, 0.4):
            assert torch.autograd.gradcheck(
                lambda x, A, B, rows=rows, p=p: multi_lora_linear(
                    x, W, A, B, (1.3, 0.4, 2.0), bias, rows=rows, dropout_p=p, dropout_key=7
                ),
                [t.double().requires_grad_() for t in (x, A, B)],
            )


@pytest.mark.parametrize("phase", ["A", "B"])
def test_a_group_with_a_common_factor_keeps_as_little_as_a_phase_needs(phase):
    """A is common where B trains, and the other way round: r numbers a row and linear, or X."""
    counts, r, sizes = (11, 0, 2), 3, (16, 8, 8)
    M = sum(counts) + 1
    rows = AdapterRows.by_counts(counts, unadapted=1)
    Ws = [torch.randn(n, K) for n in sizes]
    As = [torch.randn(*([] if phase == "B" else [3]), r, K) for _ in sizes]
    Bs = [torch.randn(*([] if phase == "A" else [3]), n, r) for n in sizes]
    trained = Bs if phase == "B" else As
    for factor in trained:
        factor.requires_grad_()
    x = torch.randn(M, K, requires_grad=True)
    with Kept() as kept:
        ys = grouped_lora_linear(x * 1.0, Ws, As, Bs, [1.0, 2.0, 0.5], [None] * 3, rows=rows)
    assert kept.bytes_beyond(*Ws, *As, *Bs) == 4 * M * (K if phase == "A" else 3 * r)
    sum(y.square().sum() for y in ys).backward()
    total = torch.zeros_like(x)
    for W, A, B, s, y, own in zip(Ws, As, Bs, (1.0, 2.0, 0.5), ys, trained, strict=True):
        xs, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
        plain = xs @ W.t()
        for c, part in ((0, slice(0, 11)), (2, slice(11, 13))):
            A_c, B_c = (A, B[c]) if phase == "B" else (A[c], B)
            plain = plain.index_add(0, torch.arange(M)[part], s * (xs[part] @ A_c.t()) @ B_c.t())
        plain.square().sum().backward()
        torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
        grad = B.grad if phase == "B" else A.grad
        torch.testing.assert_close(own.grad, grad, rtol=1e-4, atol=1e-3)
        total += xs.grad
    torch.testing.assert_close(x.grad, total, rtol=1e-4, atol=1e-3)


def test_what_ran_is_named_and_even_rows_take_the_batched_products():
    x, W, _, _, _, _ = problem(12, K, N, 1, torch.float32)
    A, B = torch.randn(3, 2, K), torch.randn(3, N, 2)
    reasons = {
        "a product an adapter": AdapterRows.by_counts([6, 4, 2]),
        "the client axis": AdapterRows.by_counts([4, 4, 4]),
        "the client axis has": AdapterRows.by_index([0, 1, 2] * 4, 3),
    }
    explain(clear=True)
    for words, rows in reasons.items():
        multi_lora_linear(x, W, A, B, 1.0, rows=rows)
        (choice,) = explain(clear=True)
        assert words in choice.reason and choice.backend == "torch"
    for backend, words in (("triton", "as many rows of every adapter"), ("reference", "no client")):
        try:
            with use_backend(backend), pytest.raises(BackendUnavailable, match=words):
                multi_lora_linear(x, W, A, B, 1.0, rows=AdapterRows.by_counts([6, 4, 2]))
        except BackendUnavailable as error:
            assert "not installed" in str(error)


def test_quantised_bases_autocast_and_checkpointing():
    x, _, _, _, _, _ = problem(8, K, N, 1, torch.float32)
    W = Int8(torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.5)
    rows = AdapterRows.by_index([1, 0, -1, 1, 1, 0, 1, 1], 2)
    A, B = torch.randn(2, 4, K), torch.randn(2, N, 4)

    def run(checkpointed):
        own = B.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(
                    lambda x: multi_lora_linear(x, W, A, own, 2.0, rows=rows),
                    x.requires_grad_(),
                    use_reentrant=False,
                )
            else:
                y = multi_lora_linear(x, W, A, own, 2.0, rows=rows)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return y, own.grad

    (y, grad), (again, same) = run(False), run(True)
    assert torch.equal(y, again) and torch.equal(grad, same)
    dense = W.dequantise(torch.float64).numpy()
    x = x.detach().double().numpy()
    truth = x @ dense.T
    for row, adapter in enumerate([1, 0, -1, 1, 1, 0, 1, 1]):
        if adapter >= 0:
            S = A[adapter].double().numpy() @ x[row]
            truth[row] += 2 * B[adapter].double().numpy() @ S
    assert rms(y, truth) <= 6e-3  # x, A and B are rounded to bf16 as well


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: AdapterRows.by_index([0, 3], 3), "0 … 2, or be -1 .* got 0 … 3"),
        (lambda: AdapterRows.by_index([0.5], 3), "must be an integer, got torch.float32"),
        (lambda: AdapterRows.by_counts([3, -1]), "0 or more"),
        (lambda: AdapterRows.by_counts([]), "one adapter at least"),
    ],
)
def test_rows_that_say_nothing_sensible_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_operands_that_speak_of_other_adapters_are_refused():
    x, W, A, B, _, _ = problem(7, K, N, 2, torch.float32)
    rows = AdapterRows.by_counts([3, 4])
    stacked = torch.stack([B, B])
    for call, words in (
        (lambda: multi_lora_linear(x, W, A, B, 1.0, rows=rows), "no factor has an axis"),
        (
            lambda: multi_lora_linear(x, W, A, torch.stack([B] * 3), 1.0, rows=rows),
            "speaks of 2 adapters, the factors are those of 3",
        ),
        (
            lambda: multi_lora_linear(x[:6], W, A, stacked, 1.0, rows=rows),
            "x has 6 rows, and an adapter is named for 7",
        ),
        (lambda: multi_lora_linear(x, W, A, [B], 1.0, rows=rows), "1 factors .* 2 adapters"),
        (lambda: multi_lora_linear(x, W, A, stacked, (1.0,), rows=rows), "1 scalings for 2"),
        (
            lambda: multi_lora_linear(x, W, A.requires_grad_(), stacked, 1.0, rows=rows),
            "trains, so 2 clients need one each",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
