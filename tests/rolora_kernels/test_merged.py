"""The merged weight against NumPy float64: results, what it keeps, what it loses, who refuses it."""

import gc
import os
import weakref

import numpy as np
import pytest
import torch

from rolora_kernels import (
    BackendUnavailable,
    explain,
    grouped_lora_linear,
    lora_linear,
    tuned,
    use_backend,
)
from rolora_kernels.weights import NF4, Int8, merged
from tests.rolora_kernels.judges import GATES, Kept, numpy_judge, problem, rms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLANS = ["merged"] + ["merged+triton[shrink,grads_of_dy,grad_A,merge]"] * INTERPRETED


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize(
    "shape", [(1, 16, 24, 1), (63, 100, 72, 4), (257, 96, 64, 12), (130, 70, 40, 64)], ids=str
)
def test_against_numpy_float64(shape, phase, dtype, plan, poisoned_empty):
    x, W, A, B, bias, dy = problem(*shape, dtype)
    truth = numpy_judge(
        x, W, A.to(dtype).double().numpy(), B.to(dtype).double().numpy(), 0.7, bias, dy
    )
    x.requires_grad_()
    A.requires_grad_(phase != "B"), B.requires_grad_(phase != "A")
    explain(clear=True)
    with use_backend(plan):
        y = lora_linear(x, W, A, B, 0.7, bias)
        y.backward(dy)
    assert [choice.backend for choice in explain(clear=True)] == [plan]
    outer, factor = GATES[dtype]
    assert rms(y, truth["y"]) <= outer and rms(x.grad, truth["dx"]) <= outer
    assert y.dtype == x.grad.dtype == dtype
    for name, f, trains in (("dA", A, phase != "B"), ("dB", B, phase != "A")):
        assert (f.grad is not None) == trains
        if trains:
            assert f.grad.dtype == torch.float32 and rms(f.grad, truth[name]) <= factor


def test_gradients_match_finite_differences():
    x, W, A, B, bias, _ = problem(9, 7, 6, 3, torch.float64)
    with use_backend("merged"):
        assert torch.autograd.gradcheck(
            lambda x, A, B: lora_linear(x, W, A, B, 1.3, bias),
            [t.double().requires_grad_() for t in (x, A, B)],
        )


@pytest.mark.parametrize("phase", ["A", "B"])
@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_a_group_is_each_linear_alone_in_float64(phase, dtype):
    """q, k, v share X: one dX, parts of one S and of one T; one output is not used."""
    M, K, sizes, ranks, scalings = 50, 40, (32, 16, 24), (4, 2, 8), (0.7, 1.5, 2.0)
    x, dys = torch.randn(M, K).to(dtype), [torch.randn(M, n).to(dtype) for n in sizes]
    Ws = [torch.randn(n, K).to(dtype) / K**0.5 for n in sizes]
    As = [torch.randn(r, K) / K**0.5 for r in ranks]
    Bs = [torch.randn(n, r) / r**0.5 for n, r in zip(sizes, ranks, strict=True)]
    trained = As if phase == "A" else Bs
    for used in ([0, 1, 2], [0, 2]):
        for factor in trained:
            factor.requires_grad_().grad = None
        xs = x.clone().requires_grad_()
        with use_backend("merged"):
            ys = grouped_lora_linear(xs, Ws, As, Bs, scalings, [None] * 3)
        torch.autograd.backward([ys[g] for g in used], [dys[g] for g in used])
        dx, (outer, inner) = 0, GATES[dtype]
        for g in used:
            A, B = (f[g].detach().to(dtype).double().numpy() for f in (As, Bs))
            truth = numpy_judge(x, Ws[g], A, B, scalings[g], None, dys[g])
            dx = dx + truth["dx"]
            assert rms(ys[g], truth["y"]) <= outer
            assert rms(trained[g].grad, truth["d" + phase]) <= inner
        assert rms(xs.grad, dx) <= 1.5 * outer  # three products are added in X's dtype
        if 1 not in used:
            assert trained[1].grad is None or not trained[1].grad.any()


@pytest.mark.parametrize("phase, kept", [("B", "S"), ("A", "X"), (None, "nothing")])
def test_nothing_of_the_merged_weight_outlives_a_pass(phase, kept, monkeypatch):
    M, K, N, r = 64, 48, 40, 4
    x, W, A, B, _, dy = problem(M, K, N, r, torch.float32)
    A.requires_grad_(phase == "A"), B.requires_grad_(phase == "B")
    made, alive = [], []

    def watched(*arguments):
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        W = merged(*arguments)
        made.append(weakref.ref(W))
        return W

    monkeypatch.setattr("rolora_kernels.weights.merged", watched)
    xs = x.requires_grad_()
    with use_backend("merged"), Kept() as saved:
        y, z = grouped_lora_linear(xs * 1.0, [W, W], [A, A], [B, B], [1.0, 2.0], [None] * 2)
    sizes = {"S": 4 * M * 2 * r, "X": 4 * M * K, "nothing": 0}
    assert saved.bytes_beyond(W, A, B) == sizes[kept]
    (y + z).backward(dy)
    assert len(made) == 4 and alive == [0] * 4  # once a pass and linear, one at a time


def test_checkpointing_and_autocast():
    """Under bf16 autocast an fp32 base is rounded once, its low-rank part included."""
    x, W, A, B, bias, dy = problem(128, 96, 64, 8, torch.float32)
    B = 1e-3 * B  # what rounding W first, and then the sum, would lose

    def run(checkpointed):
        own, xs = B.clone().requires_grad_(), x.clone().requires_grad_()
        with use_backend("merged"), torch.autocast("cpu", dtype=torch.bfloat16):
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(
                    lambda x: lora_linear(x, W, A, own, 1.0, bias), xs, use_reentrant=False
                )
            else:
                y = lora_linear(xs, W, A, own, 1.0, bias)
            y.backward(dy.bfloat16())
        return y, own.grad, xs.grad

    for ours, same in zip(run(False), run(True), strict=True):
        assert torch.equal(ours, same)
    wide = merged(W, A, B, 1.0, torch.bfloat16).double() - W.double()
    change = B.bfloat16().double() @ A.bfloat16().double()
    assert abs(float((wide * change).sum() / change.square().sum()) - 1) < 0.2  # all of it is there
    low = merged(W.bfloat16(), A, B, 1.0, torch.bfloat16).double() - W.bfloat16().double()
    assert float((low * change).sum() / change.square().sum()) < 0.7  # on bf16's grid it is not


def quantised(kind, N, K):
    """(the weight, what it means in float64)"""
    if kind == "int8":
        values, scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.1
        return Int8(values, scale), values.double() * (scale.double() / 127)[:, None]
    block, size = 64, N * K
    codes = torch.randint(0, 16, (size + size % 2,))
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    code = torch.linspace(-1, 1, 16) ** 3
    blocks = -(-size // block)
    if kind == "nf4":
        absmax = torch.rand(blocks) + 0.1
        weight, scales = NF4(packed, absmax, code, (N, K), block), absmax.double()
    else:
        code2, block2 = torch.linspace(-1, 1, 256), 256
        absmax2, offset = torch.rand(-(-blocks // block2)) + 0.1, torch.tensor(1.5)
        fine = torch.randint(0, 256, (blocks,))
        double = (code2, absmax2, block2, offset)
        weight = NF4(packed, fine.to(torch.uint8), code, (N, K), block, double)
        coarse = absmax2.double().repeat_interleave(block2)[:blocks]
        scales = code2.double()[fine] * coarse + 1.5
    exact = code.double()[codes[:size]] * scales.repeat_interleave(block)[:size]
    return weight, exact.view(N, K)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 twice"])
@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("N, K, r", [(48, 64, 8), (30, 50, 3), (130, 72, 40)], ids=str)
def test_a_quantised_base_is_rounded_once_with_what_is_added(N, K, r, dtype, kind, plan):
    """The sum is made before the one rounding, so a change far below bf16's last place survives on
    average; error at most that of rounding: u / √3 for a mantissa of u, and its spread.
    """
    weight, exact = quantised(kind, N, K)
    A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r) / r**0.5
    rounded_A, rounded_B = A.to(dtype).double().numpy(), B.to(dtype).double().numpy()
    truth = exact.numpy() + 0.7 * rounded_B @ rounded_A
    x, dy = torch.randn(20, K).to(dtype).requires_grad_(), torch.randn(20, N).to(dtype)
    B.requires_grad_()
    with use_backend(plan):
        y = lora_linear(x, weight, A, B, 0.7)
        y.backward(dy)
    unit = torch.finfo(dtype).eps
    if plan == "merged":
        assert rms(merged(weight, A, B.detach(), 0.7, dtype), truth) <= max(0.4 * unit, 3e-7)
    outer, factor = GATES[dtype]
    X, dY = x.detach().double().numpy(), dy.double().numpy()
    assert rms(y, X @ truth.T) <= outer and rms(x.grad, dY @ truth) <= outer
    assert rms(B.grad, 0.7 * dY.T @ (X @ rounded_A.T)) <= factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_lost_of_the_low_rank_part_is_what_two_products_lose(dtype):
    """The judge is float64. From 1.25 eps of |W| on, .995 of the change are in W′, and Y is within
    1.5 × a fused product's error; below, the change goes, as it does where Y is rounded twice.
    """
    M, K, N, r, eps = 256, 512, 256, 8, torch.finfo(dtype).eps
    x, W, A, B, _, _ = problem(M, K, N, r, dtype, bias=False)
    A, B = A.to(dtype), B.to(dtype)
    X, W64, change = (t.double().numpy() for t in (x, W, B.double() @ A.double()))
    for share in (100 * eps, 10 * eps, 1.25 * eps, eps / 8, eps / 64):
        s = float(share * np.linalg.norm(W64) / np.linalg.norm(change))
        truth = X @ (W64 + s * change).T
        fused = (torch.from_numpy(truth).float()).to(dtype)  # one rounding of Y
        with use_backend("merged"):
            ours = rms(lora_linear(x, W, A, B, s), truth)
        with use_backend("torch"):
            two = rms(lora_linear(x, W, A, B, s), truth)
        kept = merged(W, A, B, s, dtype).double().numpy() - W64
        survives = float((kept * change).sum() / (s * change * change).sum())
        assert 0.95 <= ours / two <= 1.05
        assert ours <= 1.5 * rms(fused, truth)
        assert abs(survives - 1) < 5e-3 if share >= 1.25 * eps else survives < 0.7


def test_what_a_merged_weight_cannot_compute_is_refused_by_name():
    x, W, A, B, _, _ = problem(6, 8, 10, 2, torch.float32)
    with use_backend("merged"):
        with pytest.raises(BackendUnavailable, match=r"'merged' is forced.* dropout drops inputs"):
            lora_linear(x, W, A, B, 1.0, dropout_p=0.1, dropout_key=3)
        with pytest.raises(BackendUnavailable, match="one for all rows, and factors of 3 clients"):
            lora_linear(x, W, A, torch.stack([B] * 3), 1.0)


@pytest.fixture
def install():
    yield lambda *rows: tuned.install(
        {"gpu": "a GPU", "capability": [9, 0], "commit": "abc", "rows": rows}, "cpu"
    )
    tuned.install({}, "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="a table names kernels, which need the interpreter")
def test_a_table_takes_it_where_it_wins_and_where_no_more_is_lost(install):
    def row(primitive, winner, *sizes):
        kinds = {"dtype": "bfloat16", "rank": 16, "configs": {}}
        return {"primitive": primitive, "winner": winner, "sizes": list(sizes)} | kinds

    def taken(M, weight=None, p=0.0, dtype=torch.bfloat16):
        x, W, A, B, _, _ = problem(M, 32, 48, 4, dtype)
        explain(clear=True)
        key = 7 if p else None
        lora_linear(x, weight or W, A, B, 1.0, dropout_p=p, dropout_key=key)
        return explain(clear=True)[0].backend

    install(row("merged", "torch", 64, 48, 32))
    assert taken(64) == "merged" and taken(26) == "merged"
    assert taken(25) == "torch"  # fewer rows than .8 of the input features
    assert taken(64, p=0.1) == "torch"
    install(row("merged", "none", 64, 48, 32))
    assert taken(64) == "torch"
    fused = row("expand_base", "triton", 64, 48, 32)
    install(row("merged", "torch", 64, 48, 32), fused)
    assert taken(64) == "triton[expand_base]"  # keeps what a merged bf16 weight loses
    weight, _ = quantised("int8", 48, 32)
    assert taken(64, weight) == "merged"  # is rounded anyway
    install(row("merged", "triton", 64, 48, 32), row("grads_of_dy", "triton", 64, 48))
    assert taken(64) == "merged+triton[grads_of_dy,merge]"


def test_it_compiles_by_vendor_libraries():
    x, W, A, B, _, dy = problem(40, 24, 32, 4, torch.float32)
    x.requires_grad_(), B.requires_grad_()

    def step(x, B):
        with use_backend("merged"):
            return lora_linear(x, W, A, B, 1.5)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    y = compiled(x, B)
    y.backward(dy)
    grads = x.grad, B.grad
    x.grad = B.grad = None
    eager = step(x, B)
    eager.backward(dy)
    torch.testing.assert_close(y, eager)
    torch.testing.assert_close(grads, (x.grad, B.grad))
