"""oneDNN called by its name: NumPy float64 is the judge, and what decides is the machine, not a
clock.
"""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from rolora import LoRAConfig, attach, detach
from rolora.adapter.frozen import FrozenLinear, speed_up
from rolora_kernels import explain, gemm, lora_linear, settled, use_backend
from rolora_kernels.weights import frozen_linear
from tests.rolora_kernels.judges import GATES, numpy_judge, problem, rms

OUTER, FACTOR = GATES[torch.float32]
pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def direct(monkeypatch):
    """oneDNN for every size, whatever the machine."""
    monkeypatch.setattr(gemm, "_WORTH", 0)
    monkeypatch.setattr(gemm, "ahead", lambda: True)
    settled.forget()  # calls of the same kind were settled for the machine as it is
    yield
    settled.forget()


def numpy64(*tensors):
    return [t.detach().double().numpy() for t in tensors]


@pytest.mark.parametrize("layout", ["rows", "columns", "parts", "broadcast"])
def test_products_of_any_strides(layout, direct):
    a, b, bias, plus = (torch.randn(*s) for s in ((70, 96), (50, 96), (50,), (70, 50)))
    if layout == "columns":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    elif layout == "parts":
        a, b, plus = (
            torch.randn(200, 210)[3:143:2, 7:103],
            b[:, ::2].repeat(1, 2),
            torch.randn(140, 99)[::2, 5:55],
        )
    elif layout == "broadcast":
        a = a[:1].expand(70, 96)
    A, B, c, P = numpy64(a, b, bias, plus)
    assert gemm.by_onednn(a, b)
    for made, truth in (
        (gemm.abt(a, b), A @ B.T),
        (gemm.abt(a, b, bias), A @ B.T + c),
        (gemm.abt(a, b, plus=plus.clone()), A @ B.T + P),
        (gemm.abt(a, b, bias, plus.clone()), A @ B.T + c + P),
    ):
        assert made.dtype == torch.float32 and rms(made, truth) <= OUTER


@pytest.mark.parametrize(
    "shape", [(1, 16, 24, 1), (257, 96, 64, 12), (128, 300, 80, 64), (40, 260, 256, 256)], ids=str
)
def test_the_rule_on_it(shape, direct, poisoned_empty):
    x, W, A, B, bias, dy = problem(*shape, torch.float32)
    truth = numpy_judge(x, W, *numpy64(A, B), 0.7, bias, dy)
    for t in (x, A, B):
        t.requires_grad_()
    explain(clear=True)
    y = lora_linear(x, W, A, B, 0.7, bias)
    assert [c.reason.endswith("; oneDNN, called directly") for c in explain(clear=True)] == [True]
    y.backward(dy)
    for value, name, gate in (
        (y, "y", OUTER),
        (x.grad, "dx", OUTER),
        (A.grad, "dA", FACTOR),
        (B.grad, "dB", FACTOR),
    ):
        assert rms(value, truth[name]) <= gate, name


def test_a_group_s_gradients_are_summed(direct):
    from rolora_kernels import grouped_lora_linear

    x, dys = torch.randn(64, 48, requires_grad=True), [torch.randn(64, n) for n in (32, 16, 8)]
    weights, As, Bs = (
        [torch.randn(*s) for s in shapes]
        for shapes in (((32, 48), (16, 48), (8, 48)), [(4, 48)] * 3, ((32, 4), (16, 4), (8, 4)))
    )
    torch.autograd.backward(grouped_lora_linear(x, weights, As, Bs, [0.5] * 3, [None] * 3), dys)
    truth = sum(
        dy @ (W + 0.5 * B @ A)
        for dy, W, A, B in zip(*(numpy64(*t) for t in (dys, weights, As, Bs)), strict=True)
    )
    assert rms(x.grad, truth) <= OUTER


def test_a_frozen_linear_and_its_gradients(direct):
    plain = nn.Linear(40, 24).requires_grad_(False)
    x, dy = torch.randn(3, 5, 40, requires_grad=True), torch.randn(3, 5, 24)
    model = nn.Sequential(copy.deepcopy(plain), nn.Linear(24, 2))
    assert (
        speed_up(model) == ["0"] and type(model[0]) is FrozenLinear and type(model[1]) is nn.Linear
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(model[0].state_dict().values(), plain.state_dict().values(), strict=True)
    )
    y = model[0](x)
    y.backward(dy)
    X, W, b, D = numpy64(x, plain.weight, plain.bias, dy)
    assert y.shape == (3, 5, 24) and rms(y, X @ W.T + b) <= OUTER and rms(x.grad, D @ W) <= OUTER
    assert model[0].weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model[0](x), y) and model[0](x[:0]).shape == (0, 5, 24)


def test_a_sped_up_linear_can_be_adapted_and_trained_afterwards(direct):
    x, model = (
        torch.randn(6, 40),
        nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 3)).requires_grad_(False),
    )
    before = model(x)
    assert speed_up(model) == ["0", "1"]
    attach(model, LoRAConfig(rank=2, target_modules=["0"]))
    model[1].requires_grad_(True)
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert rms(model[1].bias.grad, np.full(3, 6.0)) <= OUTER and model[1].weight.grad is not None
    assert type(detach(model)[0]) is nn.Linear


def test_what_ran_is_told(direct):
    x, W, A, B = torch.randn(64, 48), torch.randn(32, 48), torch.randn(4, 48), torch.randn(32, 4)
    explain(clear=True)
    frozen_linear(x, W)
    assert [(c.operation, c.backend, c.reason, c.shape) for c in explain(clear=True)] == [
        ("frozen_linear", "torch", "not adapted; oneDNN, called directly", "M=64 K=48 N=32")
    ]
    if os.environ.get("TRITON_INTERPRET") == "1":
        with use_backend("triton[shrink]"):
            lora_linear(x, W, A, B, 1.0)
        with use_backend("triton"):
            lora_linear(x, W, A, B, 1.0)
        assert [c.reason.endswith("oneDNN, called directly") for c in explain(clear=True)] == [
            True,
            False,
        ]


def test_a_gradient_of_a_gradient(direct):
    """Of W's quadratic form: the second derivative of ½ |x Wᵀ|² is Wᵀ W."""
    W, x = torch.randn(6, 5), torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(
        frozen_linear(x[None], W).square().sum() / 2, x, create_graph=True
    )
    second = torch.stack([torch.autograd.grad(f, x, retain_graph=True)[0] for f in first])
    np.testing.assert_allclose(
        second, W.double().numpy().T @ W.double().numpy(), rtol=1e-5, atol=1e-5
    )


def test_a_weight_that_is_changed_before_backward_is_noticed(direct):
    x, W = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    y = frozen_linear(x, W)
    W.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_decides():
    x, W = torch.randn(512, 256), torch.randn(256, 256)
    assert gemm.by_onednn(x, W) == gemm.ahead()
    assert (
        not gemm.by_onednn(x[:2], W)
        and not gemm.by_onednn(x, W.bfloat16())
        and not gemm.by_onednn(x.to("meta"), W.to("meta"))
    )
    assert not any(
        gemm.by_onednn(x.to(dtype), W.to(dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float64)
    )


def test_pytorch_s_switch_switches_it_off(direct):
    x, W, A, B = torch.randn(64, 48), torch.randn(32, 48), torch.randn(4, 48), torch.randn(32, 4)
    explain(clear=True)
    with torch.backends.mkldnn.flags(enabled=False), use_backend("torch"):
        assert torch.equal(frozen_linear(x, W), nn.functional.linear(x, W))
        lora_linear(x, W, A, B, 1.0)
    assert [c.reason for c in explain(clear=True)] == ["forced by use_backend"]
    with use_backend("torch"):
        lora_linear(x, W, A, B, 1.0)
    assert [c.reason for c in explain(clear=True)] == [
        "forced by use_backend; oneDNN, called directly"
    ]


LINUX = "vendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 2\n"


@pytest.mark.parametrize(
    "about, capability, taken",
    [
        (LINUX.format("AuthenticAMD", 26), "AVX512", True),
        (LINUX.format("AuthenticAMD", 26), "AVX2", False),
        (LINUX.format("AuthenticAMD", 25), "AVX512", False),
        (LINUX.format("GenuineIntel", 26), "AVX512", False),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", "AVX512", True),
        ("", "AVX512", False),
    ],
)
def test_fp32_goes_by_the_cpu(about, capability, taken, monkeypatch):
    monkeypatch.setattr(gemm, "_cpu", lambda: about)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert gemm.ahead.__wrapped__() == taken
