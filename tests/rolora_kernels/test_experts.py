"""The rule for a mixture of experts, judged by plain autograd in fp64, expert by expert."""

import pytest
import torch

from rolora_kernels import BackendUnavailable, explain, use_backend
from rolora_kernels.expert_rows import ExpertRows
from rolora_kernels.experts import expert_lora_linear
from tests.rolora_kernels.judges import GATES, rms

E, K, N, R, S = 4, 24, 40, 8, 0.75


def given(clients=1, own="", dtype=torch.float32, rows=48, empty=2):
    """(x, W, D, U, b, rows): rows sorted by expert, of which one has none; `own` names the factors
    that every client has for itself.
    """
    torch.manual_seed(0)
    experts = torch.randint(0, E, (rows,))
    experts[experts == empty] = 0
    sorted_rows = ExpertRows.of(experts, E, clients)
    order = sorted_rows.pairs.sort(torch.arange(rows))
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


TRAINED = [(1, "", trains) for trains in ("", "D", "U", "DU")] + [
    (3, own, trains)
    for own, trained in (("D", ["", "D"]), ("U", ["", "U"]), ("DU", ["", "D", "U", "DU"]))
    for trains in trained
]


@pytest.mark.parametrize("library", ["loop", "grouped_mm"])
@pytest.mark.parametrize(("clients", "own", "trains"), TRAINED)
@pytest.mark.parametrize("need_x", [True, False])
def test_outputs_and_exactly_the_gradients_that_are_asked_for(
    library, clients, own, trains, need_x, poisoned_empty
):
    x, W, D, U, b, rows, whose = given(clients, own)
    y0, *grads = judged(x, W, D, U, b, whose, cotangent := torch.randn(len(x), N))
    x.requires_grad_(need_x), D.requires_grad_("D" in trains), U.requires_grad_("U" in trains)
    y = expert_lora_linear(x, W, D, U, S, b, rows=rows, library=library)
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
    y = expert_lora_linear(x, W, D, U, S, b, rows=rows, library=library)
    outer, factor = GATES[torch.bfloat16]
    assert y.dtype == torch.bfloat16 and rms(y, y0.detach().numpy()) <= outer
    y.backward(cotangent)
    assert x.grad.dtype == torch.bfloat16 and D.grad.dtype == U.grad.dtype == torch.float32
    for tensor, wanted, gate in zip((x, D, U), grads, (outer, factor, factor), strict=True):
        assert rms(tensor.grad, wanted.numpy()) <= gate


def test_autocast_casts_and_comes_back():
    x, W, D, U, b, rows, _ = given()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_lora_linear(x, W, D.requires_grad_(), U, S, b, rows=rows)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and D.grad.dtype == torch.float32


@pytest.mark.parametrize(("trains", "sizes"), [("U", {(R,)}), ("D", {(K,)}), ("DU", {(R,), (K,)})])
def test_what_a_phase_keeps(trains, sizes):
    x, W, D, U, b, rows, _ = given()
    D.requires_grad_("D" in trains), U.requires_grad_("U" in trains)
    own, kept = {t.data_ptr() for t in (W, D, U)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_lora_linear(x, W, D, U, S, b, rows=rows)
    widths = {t.shape[1:] for t in kept if t is not None and t.data_ptr() not in own}
    assert widths == {torch.Size(size) for size in sizes}, "x alone, or S alone; no W without dx"


def test_sorting_keeps_the_rows_of_a_client_together():
    rows = ExpertRows.of(torch.tensor([1, 0, 1, 1, 0, 2]), 4, 2)
    assert rows.pairs.order.tolist() == [1, 4, 0, 2, 3, 5]
    assert rows.pairs.counts == (1, 1, 2, 1, 0, 1, 0, 0)
    assert rows.spans == ((0, slice(0, 2)), (1, slice(2, 5)), (2, slice(5, 6)))
    own = (((0, 0), 0, 1), ((1, 0), 1, 2), ((0, 1), 2, 4), ((1, 1), 4, 5), ((1, 2), 5, 6))
    assert rows.parts == tuple((where, slice(a, b)) for where, a, b in own)


def test_no_rows_at_all():
    x, W, D, U, b, _, _ = given()
    rows = ExpertRows.of(torch.zeros(0, dtype=torch.int64), E)
    y = expert_lora_linear(x[:0], W, D.requires_grad_(), U, S, b, rows=rows)
    y.sum().backward()
    assert y.shape == (0, N) and not D.grad.any()


def test_what_ran_is_recorded_and_a_plan_that_cannot_run_is_refused():
    x, W, D, U, b, rows, _ = given()
    explain(clear=True)
    expert_lora_linear(x, W, D, U, S, b, rows=rows)
    (choice,) = explain(clear=True)
    assert (choice.operation, choice.backend) == ("expert_lora_linear", "torch")
    assert choice.reason.endswith("; loop") and choice.shape == f"M=48 K={K} N={N} r={R} E={E}"
    with use_backend("reference"), pytest.raises(BackendUnavailable, match="forced"):
        expert_lora_linear(x, W, D, U, S, b, rows=rows)


@pytest.mark.parametrize("wrong", ["x", "W", "D", "U", "b", "rows"])
def test_operands_that_do_not_fit_are_refused(wrong):
    x, W, D, U, b, rows, _ = given()
    named = {"x": x, "W": W, "D": D, "U": U, "b": b, "rows": rows}
    fewer = ExpertRows.of(torch.zeros(48, dtype=torch.int64), E - 1)
    named[wrong] = fewer if wrong == "rows" else named[wrong][..., :-1]
    with pytest.raises(ValueError, match="expected x"):
        x, W, D, U, b, rows = named.values()
        expert_lora_linear(x, W, D, U, S, b, rows=rows)


def test_a_base_that_trains_or_has_another_dtype_is_refused():
    x, W, D, U, b, rows, _ = given()
    with pytest.raises(ValueError, match="frozen here"):
        expert_lora_linear(x, W.requires_grad_(), D, U, S, b, rows=rows)
    with pytest.raises(ValueError, match="or use torch"):
        expert_lora_linear(x, W.detach().bfloat16(), D, U, S, b, rows=rows)


@pytest.mark.parametrize("own", ["D", "U", "DU"])
def test_a_cohort_of_one_client_is_that_client(own):
    x, W, D, U, b, rows, whose = given()
    y0, *grads = judged(x, W, D, U, b, whose, cotangent := torch.randn(len(x), N))
    D, U = (t[None] if n in own else t for n, t in (("D", D), ("U", U)))
    D.requires_grad_(), U.requires_grad_()
    y = expert_lora_linear(x, W, D, U, S, b, rows=rows)
    y.backward(cotangent)
    assert close(y, y0, 1e-5)
    for factor, wanted in zip((D, U), grads[1:], strict=True):
        assert close(factor.grad, wanted.view(factor.shape), 1e-5)


def test_an_expert_that_one_client_never_meets_has_a_gradient_of_zero_there():
    torch.manual_seed(0)
    chosen = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 1, 1, 3, 3])  # the second of two: no 0, no 2
    rows = ExpertRows.of(chosen, E, 2)
    order = rows.pairs.sort(torch.arange(12))
    whose = [order // 6, chosen[order]]
    x, W, b = torch.randn(12, K), torch.randn(E, N, K), torch.randn(E, N)
    D, U = torch.randn(2, E, R, K, requires_grad=True), torch.randn(2, E, N, R, requires_grad=True)
    y0, _, *grads = judged(x, W, D, U, b, whose, cotangent := torch.randn(12, N))
    y = expert_lora_linear(x, W, D, U, S, b, rows=rows)
    y.backward(cotangent)
    assert close(y, y0, 1e-5)
    for factor, wanted in zip((D, U), grads, strict=True):
        assert close(factor.grad, wanted, 1e-5)
        seen = factor.grad.flatten(2).any(2)
        assert seen.tolist() == [[True, True, True, False], [False, True, False, True]]


def test_a_factor_that_trains_for_all_clients_at_once_is_refused():
    x, W, D, U, b, rows, _ = given(3, "D")
    with pytest.raises(ValueError, match=r"lora_B .* trains, so 3 clients need one each"):
        expert_lora_linear(x, W, D, U.requires_grad_(), S, b, rows=rows)


@pytest.mark.parametrize("plan", ["triton", "triton[shrink,grads_of_dy]"])
@pytest.mark.parametrize("need_x", [True, False])
def test_our_kernels_take_one_expert_after_another(plan, need_x, poisoned_empty):
    pytest.importorskip("triton")
    x, W, D, U, b, rows, whose = given()
    y0, *grads = judged(x, W, D, U, b, whose, cotangent := torch.randn(len(x), N))
    x.requires_grad_(need_x), D.requires_grad_(), U.requires_grad_()
    explain(clear=True)
    with use_backend(plan):
        y = expert_lora_linear(x, W, D, U, S, b, rows=rows)
    assert explain(clear=True)[0].backend == plan and close(y, y0, 1e-5)
    y.backward(cotangent)
    for tensor, wanted in zip((x, D, U), grads, strict=True):
        assert tensor.grad is None if not tensor.requires_grad else close(tensor.grad, wanted, 1e-5)


@pytest.mark.parametrize("plan", ["reference", "merged"])
def test_plans_without_primitives_an_expert_are_refused(plan):
    x, W, D, U, b, rows, _ = given()
    with use_backend(plan), pytest.raises(BackendUnavailable, match="one expert after another"):
        expert_lora_linear(x, W, D, U, S, b, rows=rows)
    x, W, D, U, b, rows, _ = given(3, "D")
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="vendor libraries alone"):
        expert_lora_linear(x, W, D, U, S, b, rows=rows)
