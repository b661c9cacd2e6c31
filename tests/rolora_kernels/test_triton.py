"""Tier 2: every Triton kernel against NumPy float64, in the interpreter here, on the device where
there is one.
"""

import os
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import (
    Plan,
    explain,
    grouped_lora_linear,
    lora_linear,
    torch_ops,
    triton_ops,
    use_backend,
)
from rolora_kernels.dropout import Dropout, keep_mask
from tests.rolora_kernels.judges import GATES, Kept, numpy_judge, problem, rms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 16, 24, 1),
    (63, 100, 72, 4),
    (130, 130, 250, 8),
    (70, 50, 90, 12),
    (33, 260, 70, 64),
    (20, 30, 40, 30),
]
HAS_TMA = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or the interpreter",
)


def on_device(*tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


TMA = "triton[shrink,expand_base:tma,grads_of_dy,base_dx:tma,grad_A]"
CASES = [(*case, "triton") for case in product(SHAPES, (0.0, 0.25), GATES)] + [
    (*case, TMA)
    for case in product(
        [(1, 16, 24, 1), (63, 104, 72, 4), (300, 136, 264, 12), (33, 264, 72, 64)],
        (0.0, 0.25),
        GATES,
    )
    if case[-1] != torch.float32
]


@pytest.mark.parametrize("shape, p, dtype, backend", CASES, ids=str)
def test_the_rule_on_our_kernels(shape, p, dtype, backend, poisoned_empty):
    if "tma" in backend and not HAS_TMA:
        pytest.skip("no TMA on this GPU")
    x, W, A, B, bias, dy = problem(*shape, dtype)
    M, K, scaling, key = shape[0], shape[1], 0.7, torch.tensor(-12345)
    mask = keep_mask(range(M), K, Dropout(p, key)).double().numpy() / (1 - p) if p else 1.0
    truth = numpy_judge(
        x, W, A.to(dtype).double().numpy(), B.to(dtype).double().numpy(), scaling, bias, dy, mask
    )
    if "expand_base:tma" in backend:  # which rounds scaling · B, once, in the place of B
        scaled = (scaling * B).to(dtype).double().numpy()
        A64 = A.to(dtype).double().numpy()
        truth["y"] = numpy_judge(x, W, A64, scaled, 1.0, bias, dy, mask)["y"]
    x, W, A, B, bias, dy, key = on_device(x, W, A, B, bias, dy, key)
    for t in (x, A, B):
        t.requires_grad_()
    explain(clear=True)
    with use_backend(backend):
        y = lora_linear(x, W, A, B, scaling, bias, dropout_p=p, dropout_key=key)
        y.backward(dy)
    assert [c.backend for c in explain(clear=True)] == [backend]
    outer, factor = GATES[dtype]
    for name, value, gate in (
        ("y", y, outer),
        ("dx", x.grad, outer),
        ("dA", A.grad, factor),
        ("dB", B.grad, factor),
    ):
        assert rms(value.cpu(), truth[name]) <= gate, name
    assert A.grad.dtype == B.grad.dtype == torch.float32 and y.dtype == x.grad.dtype == dtype


@pytest.mark.skipif(not HAS_TMA, reason="no TMA on this GPU")
def test_the_persistent_kernel_takes_groups_and_transposed_weights_and_refuses_what_it_cannot_address():
    M, K, N, r = 150, 40, 144, 4
    x, W, A, B, bias, dy = on_device(*problem(M, K, N, r, torch.bfloat16))
    T, drop = (dy.double() @ B.double()).bfloat16(), Dropout(0.25, torch.tensor(11, device=DEVICE))
    S = (x.double() @ A.double().t()).bfloat16()
    turned = W.t().contiguous().t()  # as a Conv1D hands it in
    for weight in (W, turned):
        wide = weight.double()
        truth = torch_ops.base_dx(
            [dy.double()] * 3, [wide] * 3, T.double(), A.bfloat16().double(), drop
        ).cpu()
        ours = triton_ops.base_dx(
            [dy, dy, dy[:1].expand(M, N) * 0 + dy], [weight] * 3, T, A, drop, tma=True
        )
        # each linear of a group after the first reads dX as it was rounded
        assert rms(ours.cpu(), truth) <= 6e-3
        truth = torch_ops.expand_base(
            x.double(), wide, S.double(), B.bfloat16().double(), 1.3, bias.double()
        ).cpu()
        assert (
            rms(triton_ops.expand_base(x, weight, S, B, 1.3, bias, tma=True).cpu(), truth) <= 3e-3
        )
    empty = triton_ops.base_dx([dy[:0]], [W], T[:0], A, tma=True)
    assert empty.shape == (0, K)
    with pytest.raises(ValueError, match="rows of a multiple of 16 bytes, got 100 and 40 elements"):
        triton_ops.expand_base(x, W[:100], S, B[:100], 1.0, None, tma=True)
    with pytest.raises(ValueError, match="not a 16-bit type"):
        triton_ops.expand_base(x.float(), W.float(), S.float(), B, 1.0, None, tma=True)
    with (
        pytest.raises(ValueError, match="expand_base and base_dx also with :tma"),
        use_backend("triton[shrink:tma]"),
    ):
        pass


@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_each_primitive_rounds_no_more_than_the_vendors(dtype, poisoned_empty):
    """Error against float64 ≤ 1.05 × that of torch_ops on the same operands; strided operands
    included.
    """
    M, K, N, r = 67, 100, 90, 12
    x, W, A, B, bias, dy = problem(M, K, N, r, dtype)
    A, B, W = A.to(dtype), B.to(dtype), W.t().contiguous().t()  # W as a Conv1D hands it in
    S = (x.double() @ A.double().t()).to(dtype)
    T = (dy.double() @ B.double()).to(dtype)
    drop = Dropout(0.2, torch.tensor(5))
    calls = {
        "shrink": lambda o, c: o.shrink(c(x), c(A), drop),
        "expand_base": lambda o, c: o.expand_base(c(x), c(W), c(S), c(B), 1.3, c(bias)),
        "T": lambda o, c: o.grads_of_dy(c(dy), c(B), None, 0.3)[0],
        "dB": lambda o, c: o.grads_of_dy(c(dy), None, c(S), 0.3)[1],
        "base_dx": lambda o, c: o.base_dx([c(dy), c(dy)], [c(W), c(W)], c(T), c(A), drop),
        "grad_A": lambda o, c: o.grad_A(c(T), c(x), drop),
    }
    for name, call in calls.items():
        truth = call(torch_ops, torch.Tensor.double).numpy()
        ours, vendors = call(triton_ops, lambda t: t.to(DEVICE)).cpu(), call(torch_ops, lambda t: t)
        assert rms(ours, truth) <= max(1.05 * rms(vendors, truth), 2e-7), name


def test_groups_share_one_launch_of_shrink_and_keep_as_little():
    x = torch.randn(40, 48, device=DEVICE, requires_grad=True)
    Ws = [torch.randn(n, 48, device=DEVICE) / 7 for n in (32, 16, 16)]
    As = [torch.randn(4, 48, device=DEVICE) / 7 for _ in Ws]
    Bs = [torch.randn(len(W), 4, device=DEVICE, requires_grad=True) for W in Ws]
    results = []
    for backend in ("triton", "torch"):
        x.grad = None
        for B in Bs:
            B.grad = None
        with use_backend(backend), Kept() as kept:
            ys = grouped_lora_linear(x * 1.0, Ws, As, Bs, [1.0, 2.0, 0.5], [None] * 3)
        assert kept.bytes_beyond(*Ws, *As, *Bs) == 4 * 40 * 12
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        results.append([*(y.detach() for y in ys), x.grad, *(B.grad for B in Bs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mixture_takes_the_named_primitives_from_our_kernels():
    from rolora_kernels import primitives

    mixed = primitives.of(Plan(shrink="triton", grad_A="triton"))
    assert (
        mixed.shrink is triton_ops.shrink
        and mixed.base_dx is torch_ops.base_dx
        and mixed.rank_buffer is torch_ops.rank_buffer
    )
    x, W, A, B, bias, dy = on_device(*problem(40, 32, 24, 4, torch.float32))
    A.requires_grad_()
    explain(clear=True)
    with use_backend("triton[shrink,grad_A]"):
        lora_linear(x, W, A, B, 1.0, bias).backward(dy)
    assert [c.backend for c in explain(clear=True)] == ["triton[shrink,grad_A]"]
    torch.testing.assert_close(A.grad, (dy @ B).t() @ x, rtol=1e-4, atol=1e-4)
    with (
        pytest.raises(ValueError, match="names of shrink, expand_base"),
        use_backend("triton[shrunk]"),
    ):
        pass


def test_empty_batches_and_unfit_operands():
    x, W, A, B = (
        torch.randn(*s, device=DEVICE, requires_grad=s != (6, 8))
        for s in ((0, 8), (6, 8), (2, 8), (6, 2))
    )
    with use_backend("triton"):
        lora_linear(x, W, A, B, 1.0).sum().backward()
        assert A.grad.abs().sum() == B.grad.abs().sum() == 0
        with pytest.raises(
            RuntimeError, match=r"'triton' is forced, but cannot run: torch.float64 is not one of"
        ):
            lora_linear(*(t.double() for t in (x, W.detach(), A, B)), 1.0)


def test_partials_over_many_blocks_are_summed():
    """More rows than one program owns (ROWS), in both reductions."""
    M, K, N, r = 1100, 20, 24, 3
    x, W, A, B, bias, dy = problem(M, K, N, r, torch.float32)
    S = np.ascontiguousarray((x @ A.t()).numpy())
    _, dB = triton_ops.grads_of_dy(dy.to(DEVICE), None, torch.from_numpy(S).to(DEVICE), 2.0)
    assert rms(dB.cpu(), 2.0 * dy.double().numpy().T @ S.astype(np.float64)) < 1e-6
    dA = triton_ops.grad_A(torch.from_numpy(S).to(DEVICE), x.to(DEVICE))
    assert rms(dA.cpu(), S.astype(np.float64).T @ x.double().numpy()) < 1e-6


def operands():
    x, W, A, B, bias, dy = on_device(*problem(20, 24, 16, 4, torch.float32))
    S, T, key = x @ A.t(), dy @ B, torch.tensor(3, device=DEVICE)
    return {
        "shrink": (x, A, 0.2, key),
        "expand_base": (x, W, S, B, 0.5, bias, False),
        "grads_of_dy": (dy, B, S, 0.5),
        "base_dx": ([dy, dy], [W, W], T, A, 0.2, key, False),
        "grad_a": (T, x, 0.0, None),
    }


@pytest.mark.parametrize("name", ["shrink", "expand_base", "grads_of_dy", "base_dx", "grad_a"])
def test_operators_pass_opcheck(name):
    from rolora_kernels.triton_ops import library

    torch.library.opcheck(getattr(library, f"{name}_op"), operands()[name])


@pytest.mark.parametrize("phase", ["A", "B"])
def test_compiled_code_runs_our_kernels_without_a_break(phase):
    x, W, A, B, bias, dy = on_device(*problem(24, 32, 16, 4, torch.float32))
    results, key = [], torch.tensor(9, device=DEVICE)
    torch._dynamo.reset()
    for compiled in (False, True):
        f = (
            torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
            if compiled
            else lora_linear
        )
        xs, As, Bs = x.clone().requires_grad_(), A.clone(), B.clone()
        As.requires_grad_(phase == "A"), Bs.requires_grad_(phase == "B")
        with use_backend("triton"), Kept() as kept:
            y = f(xs, W, As, Bs, 1.0, bias, dropout_p=0.1, dropout_key=key)
        y.backward(dy)
        results.append(
            (
                y.detach(),
                xs.grad,
                (As if phase == "A" else Bs).grad,
                kept.bytes_beyond(W, As, Bs, bias, key),
            )
        )
    assert results[0][3] == 4 * 24 * (32 if phase == "A" else 4)
    for eager, other in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-5)
