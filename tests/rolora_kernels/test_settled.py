"""What is settled once for all calls of a kind, and what makes another kind."""

from itertools import pairwise

import pytest
import torch

from rolora_kernels import explain, grouped_lora_linear, lora_linear, operands, settled, use_backend
from rolora_kernels.weights import Int8


@pytest.fixture(autouse=True)
def fresh():
    settled.forget()
    explain(clear=True)


@pytest.fixture
def checks(monkeypatch):
    """A list that grows when operands are checked."""
    seen, right = [], operands.check
    monkeypatch.setattr(operands, "check", lambda *a: seen.append(1) or right(*a))
    return seen


def given(M=6, K=8, N=10, r=3, dtype=torch.float32, train="B"):
    x, W = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    A, B = torch.randn(r, K), torch.randn(N, r)
    (A if train == "A" else B).requires_grad_()
    return x, W, A, B, 0.5


def test_a_kind_is_settled_once_and_every_call_counted(checks):
    operands_ = given()
    for _ in range(5):
        lora_linear(*operands_)
    lora_linear(*given())  # other values, the same kind
    assert len(checks) == 1
    (choice,) = explain(clear=True)
    assert choice.calls == 6 and choice.shape == "M=6 K=8 N=10 r=3"
    lora_linear(*operands_)
    assert len(checks) == 1 and [c.calls for c in explain()] == [1]


@pytest.mark.parametrize("change", ["M", "K", "N", "r", "dtype", "train", "dropout", "lead"])
def test_another_kind_is_settled_anew(change, checks):
    lora_linear(*given())
    other = {"M": 7, "K": 9, "N": 11, "r": 4, "dtype": torch.float64, "train": "A"}
    x, *rest = given(**{change: other[change]} if change in other else {})
    if change == "lead":
        x = x.view(2, 3, 8)
    extra = {"dropout_p": 0.5, "dropout_key": 1} if change == "dropout" else {}
    y = lora_linear(x, *rest, **extra)
    assert len(checks) == 2 and y.shape == (*x.shape[:-1], rest[0].shape[0])


def test_a_plan_that_is_forced_autocast_and_storage_make_other_kinds(checks):
    operands_ = given()
    plain = lora_linear(*operands_)
    with use_backend("reference"):
        assert torch.allclose(lora_linear(*operands_), plain, atol=1e-5)
    with torch.autocast("cpu"):
        assert lora_linear(*operands_).dtype == torch.bfloat16
    x, _, *rest = operands_
    lora_linear(x, Int8(torch.ones(10, 8, dtype=torch.int8), torch.ones(10)), *rest)
    assert len(checks) == 4
    assert lora_linear(*operands_).dtype == torch.float32 and len(checks) == 4


def test_operands_that_do_not_fit_raise_at_every_call():
    """An error is not remembered as a kind, and one that fits is not taken for one that does not."""
    x, W, A, B, s = given()
    lora_linear(x, W, A, B, s)
    for _ in range(2):
        with pytest.raises(ValueError, match="shapes do not fit"):
            lora_linear(x[:, :7], W, A, B, s)
        with pytest.raises(ValueError, match="frozen here"):
            lora_linear(x, W.clone().requires_grad_(), A, B, s)
        with pytest.raises(ValueError, match="cast one of them"):
            lora_linear(x, W.double(), A, B, s)


def test_an_output_of_several_axes_can_be_changed_in_place():
    """No view: autograd would refuse a residual that is added in place."""
    x, W, A, B, s = given()
    x = x.view(2, 3, 8).requires_grad_()
    y = lora_linear(x, W, A, B, s)
    kept = y.detach().clone()
    y += 1.0
    y.sum().backward()
    assert torch.equal(y.detach(), kept + 1.0) and x.grad.shape == x.shape
    assert torch.allclose(x.grad[0, 0], (W + s * B @ A).sum(0).detach(), atol=1e-4)


def test_the_linears_of_a_group_are_apart_in_a_kind(checks):
    x, W, A, B, s = given()
    for count in (1, 2, 3):
        grouped_lora_linear(x, [W] * count, [A] * count, [B] * count, [s] * count, [None] * count)
    assert len(checks) == 3
    assert all(a.linears < b.linears for a, b in pairwise(explain()))


def test_kinds_are_forgotten_before_they_fill_the_memory(monkeypatch, checks):
    monkeypatch.setattr(settled, "_MOST", 4)
    for M in range(1, 10):
        lora_linear(*given(M=M))
    assert len(settled._kinds) <= 4 and len(checks) == 9
