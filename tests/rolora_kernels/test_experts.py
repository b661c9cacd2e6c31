"""The rule for a mixture of experts, judged by plain autograd in fp64, expert by expert."""

import pytest
import torch

from rolora_kernels import BackendUnavailable, explain, use_backend
from rolora_kernels.expert_rows import Rows
from rolora_kernels.experts import expert_lora_linear

E, K, N, R, S = 4, 24, 40, 8, 0.75


def given(clients=1, own="", dtype=torch.float32, rows=48, empty=2):
    """(x, W, D, U, b, rows): rows sorted by expert, of which one has none; `own` names the factors
    that every client has for itself.
    """
    torch.manual_seed(0)
    experts = torch.randint(0, E, (rows,))
    experts[experts == empty] = 0
    order, sorted_rows = Rows.of(experts, E, clients)
    whose = [order // (rows // clients), experts[order]]
    lead = {name: ((clients, E) if name in own else (E,)) for name in "DU"}
    x, W, b = torch.randn(rows, K), torch.randn(E, N, K) / K**0.5, torch.randn(E, N)
    D, U = torch.randn(*lead["D"], R, K) / K**0.5, torch.randn(*lead["U"], N, R) / R**0.5
    return x.to(dtype), W.to(dtype), D, U, b.to(dtype), sorted_rows, whose


def judged(x, W, D, U, b, whose, cotangent):
    """y, and the gradients of x, D and U, row by row in fp64."""
    x, D, U = (t.double().requires_grad_() for t in (x, D, U))
    y = []
    for row, client, expert in zip(x, *whose, strict=True):
        d, u = (f[client, expert] if f.ndim == 4 else f[expert] for f in (D, U))
        y.append(W[expert].double() @ row + b[expert].double() + S * (u @ (d @ row)))
    y = torch.stack(y)
    return y, *torch.autograd.grad(y, (x, D, U), cotangent.double())


def close(a, b, gate):
    return (a.double() - b).abs().max() <= gate * b.abs().max()


@pytest.mark.parametrize("library", ["loop", "grouped_mm"])
@pytest.mark.parametrize("trains", ["", "D", "U", "DU"])
@pytest.mark.parametrize(("clients", "own"), [(1, ""), (3, "D"), (3, "U"), (3, "DU")])
@pytest.mark.parametrize("need_x", [True, False])
def test_outputs_and_exactly_the_gradients_that_are_asked_for(
    library, trains, clients, own, need_x
):
    x, W, D, U, b, rows, whose = given(clients, own)
    y0, *grads = judged(x, W, D, U, b, whose, cotangent := torch.randn(len(x), N))
    x.requires_grad_(need_x), D.requires_grad_("D" in trains), U.requires_grad_("U" in trains)
    y = expert_lora_linear(x, W, D, U, S, rows, b, library=library)
    assert close(y, y0, 1e-5)
    if not (need_x or trains):
        assert not y.requires_grad
        return
    y.backward(cotangent)
    for tensor, wanted in zip((x, D, U), grads, strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            assert tensor.grad.dtype == torch.float32 and close(tensor.grad, wanted, 1e-5)
    for factor in (D, U):
        if factor.grad is not None:
            assert not factor.grad[..., 2, :, :].any(), "an expert without rows: exactly 0"


@pytest.mark.parametrize("library", ["loop", "grouped_mm"])
def test_bf16_has_fp32_gradients_of_an_fp32_accumulator(library):
    x, W, D, U, b, rows, whose = given(dtype=torch.bfloat16, rows=512)
    y0, *grads = judged(
        x, W, D.bfloat16(), U.bfloat16(), b, whose, cotangent := torch.randn(len(x), N).bfloat16()
    )
    D.requires_grad_(), U.requires_grad_(), x.requires_grad_()
    y = expert_lora_linear(x, W, D, U, S, rows, b, library=library)
    assert y.dtype == torch.bfloat16 and close(y, y0, 2e-2)
    y.backward(cotangent)
    assert x.grad.dtype == torch.bfloat16 and D.grad.dtype == U.grad.dtype == torch.float32
    for tensor, wanted in zip((x, D, U), grads, strict=True):
        assert close(tensor.grad, wanted, 2e-2)


def test_autocast_casts_and_comes_back():
    x, W, D, U, b, rows, _ = given()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_lora_linear(x, W, D.requires_grad_(), U, S, rows, b)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and D.grad.dtype == torch.float32


@pytest.mark.parametrize(("trains", "sizes"), [("U", {(R,)}), ("D", {(K,)}), ("DU", {(R,), (K,)})])
def test_what_a_phase_keeps(trains, sizes):
    x, W, D, U, b, rows, _ = given()
    D.requires_grad_("D" in trains), U.requires_grad_("U" in trains)
    own, kept = {t.data_ptr() for t in (W, D, U)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_lora_linear(x, W, D, U, S, rows, b)
    widths = {t.shape[1:] for t in kept if t is not None and t.data_ptr() not in own}
    assert widths == {torch.Size(size) for size in sizes}, "x alone, or S alone; no W without dx"


def test_sorting_keeps_the_rows_of_a_client_together():
    experts = torch.tensor([1, 0, 1, 1, 0, 2])
    order, rows = Rows.of(experts, 3, 2)
    assert order.tolist() == [1, 4, 0, 2, 3, 5]
    assert rows.counts.tolist() == [[1, 1], [2, 1], [0, 1]]
    assert [(e, s.start, s.stop, len(p)) for e, s, p in rows.spans()] == [
        (0, 0, 2, 2), (1, 2, 5, 2), (2, 5, 6, 1),
    ]  # fmt: skip


def test_no_rows_at_all():
    x, W, D, U, b, _, _ = given()
    rows = Rows(torch.zeros(E, 1, dtype=torch.int64))
    y = expert_lora_linear(x[:0], W, D.requires_grad_(), U, S, rows, b)
    y.sum().backward()
    assert y.shape == (0, N) and not D.grad.any()


def test_what_ran_is_recorded_and_a_plan_that_cannot_run_is_refused():
    x, W, D, U, b, rows, _ = given()
    explain(clear=True)
    expert_lora_linear(x, W, D, U, S, rows, b)
    (choice,) = explain(clear=True)
    assert (choice.operation, choice.backend) == ("expert_lora_linear", "torch")
    assert choice.reason.endswith("; loop") and choice.shape == f"M=48 K={K} N={N} r={R} E={E}"
    with use_backend("reference"), pytest.raises(BackendUnavailable, match="forced"):
        expert_lora_linear(x, W, D, U, S, rows, b)


@pytest.mark.parametrize("wrong", ["x", "W", "D", "U", "b", "rows"])
def test_operands_that_do_not_fit_are_refused(wrong):
    x, W, D, U, b, rows, _ = given()
    named = {"x": x, "W": W, "D": D, "U": U, "b": b, "rows": rows}
    named[wrong] = Rows(rows.counts[:-1]) if wrong == "rows" else named[wrong][..., :-1]
    with pytest.raises(ValueError, match="expected x"):
        x, W, D, U, b, rows = named.values()
        expert_lora_linear(x, W, D, U, S, rows, b)


def test_a_base_that_trains_or_has_another_dtype_is_refused():
    x, W, D, U, b, rows, _ = given()
    with pytest.raises(ValueError, match="frozen here"):
        expert_lora_linear(x, W.requires_grad_(), D, U, S, rows, b)
    with pytest.raises(ValueError, match="or use torch"):
        expert_lora_linear(x, W.detach().bfloat16(), D, U, S, rows, b)
