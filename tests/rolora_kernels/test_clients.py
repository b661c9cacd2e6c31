"""The client axis of the rule: every client against NumPy float64 by itself, and what is kept."""

import os

import pytest
import torch

from rolora_kernels import (
    BackendUnavailable,
    explain,
    grouped_lora_linear,
    lora_linear,
    use_backend,
)
from rolora_kernels.dropout import Dropout, keep_mask
from tests.rolora_kernels.judges import GATES, Kept, numpy_judge, problem, rms


def cohort(C, m, K, N, r, dtype, phase):
    """x and dy of C clients, and factors: one a client where they train, else common."""
    x, W, _, _, bias, dy = problem(C * m, K, N, r, dtype)
    A = torch.randn(*([C] if phase != "B" else []), r, K) / K**0.5
    B = torch.randn(*([C] if phase != "A" else []), N, r) / r**0.5
    return x, W, A, B, bias, dy


BACKENDS = (
    ["torch", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch"]
)  # on a GPU: test_gpu.py


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize(
    "shape",
    [(1, 20, 24, 16, 4), (3, 33, 40, 56, 1), (5, 64, 70, 30, 12), (2, 1100, 24, 20, 3)],
    ids=str,
)
def test_every_client_is_what_numpy_says_it_is_alone(
    shape, phase, p, dtype, backend, poisoned_empty
):
    """The last shape has more rows a client than one program sums (ROWS)."""
    C, m, K, N, r = shape
    if m > 1000 and backend == "triton" and dtype != torch.bfloat16:
        pytest.skip("slow in the interpreter, and the same code")
    x, W, A, B, bias, dy = cohort(C, m, K, N, r, dtype, phase)
    keys, rows = torch.arange(C) * 977 - 5, torch.arange(m).repeat(C)
    x.requires_grad_(), A.requires_grad_(A.ndim == 3), B.requires_grad_(B.ndim == 3)
    key = torch.stack([keys.repeat_interleave(m), rows]) if p else None
    explain(clear=True)
    with use_backend(backend):
        y = lora_linear(x, W, A, B, 0.7, bias, dropout_p=p, dropout_key=key)
        y.backward(dy)
    assert [c.backend for c in explain(clear=True)] == [backend]
    outer, factor = GATES[dtype]
    for c in range(C):
        own = slice(c * m, (c + 1) * m)
        A_c, B_c = (f.detach()[c] if f.ndim == 3 else f for f in (A, B))
        mask = keep_mask(range(m), K, Dropout(p, keys[c])).double().numpy() / (1 - p) if p else 1.0
        truth = numpy_judge(
            x.detach()[own],
            W,
            A_c.to(dtype).double().numpy(),
            B_c.to(dtype).double().numpy(),
            0.7,
            bias,
            dy[own],
            mask,
        )
        assert rms(y[own], truth["y"]) <= outer and rms(x.grad[own], truth["dx"]) <= outer
        for name, f in (("dA", A), ("dB", B)):
            if f.ndim == 3:
                assert f.grad.dtype == torch.float32 and rms(f.grad[c], truth[name]) <= factor
    assert (A.grad is None) == (phase == "B") and (B.grad is None) == (phase == "A")


@pytest.mark.parametrize("phase", ["A", "B"])
def test_groups_of_linears_of_a_cohort_are_each_linear_alone_and_keep_as_little(phase):
    C, m, K, r = 4, 10, 24, 3
    x = torch.randn(C * m, K)
    Ws = [torch.randn(n, K) for n in (16, 8, 8)]
    factors = [cohort(C, m, K, len(W), r, torch.float32, phase)[2:4] for W in Ws]
    As, Bs = ([f[i].clone().requires_grad_(f[i].ndim == 3) for f in factors] for i in (0, 1))
    xs = x.clone().requires_grad_()
    with Kept() as kept:
        ys = grouped_lora_linear(xs * 1.0, Ws, As, Bs, [1.0, 2.0, 0.5], [None] * 3)
    assert kept.bytes_beyond(*Ws, *As, *Bs) == 4 * C * m * (K if phase == "A" else 3 * r)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    total = torch.zeros_like(x)
    for W, (A, B), s, y, ours in zip(
        Ws, factors, (1.0, 2.0, 0.5), ys, As if phase == "A" else Bs, strict=True
    ):
        alone = x.clone().requires_grad_()
        A, B = A.clone().requires_grad_(A.ndim == 3), B.clone().requires_grad_(B.ndim == 3)
        single = lora_linear(alone, W, A, B, s)
        single.sum().backward()
        torch.testing.assert_close(y, single, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, (A if phase == "A" else B).grad, rtol=1e-5, atol=1e-5)
        total += alone.grad
    torch.testing.assert_close(xs.grad, total, rtol=1e-5, atol=1e-4)


def test_the_common_factor_is_computed_once_for_all():
    """Phase B of 8 clients: one GEMM for S, one for the base, one batched for the expansion,
    whatever the number of clients.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Gemms(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in (
                "mm",
                "addmm",
                "addmm_",
                "bmm",
                "baddbmm",
                "baddbmm_",
            ):
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, W, A, B, _, dy = cohort(8, 6, 24, 16, 4, torch.float32, "B")
    names = []
    x.requires_grad_(), B.requires_grad_()
    with Gemms():
        y = lora_linear(x, W, A, B, 1.0)
    assert len(names) == 3 and names.count("baddbmm_") == 1, names
    names.clear()
    with Gemms():
        y.backward(dy)
    assert (
        len(names) == 4 and names.count("mm") + names.count("addmm_") == 2
    )  # dy W, T A; dy B and dyᵀ S a client


def test_cohorts_that_do_not_fit_are_refused_with_their_shapes():
    x, W, A, B, _, _ = cohort(3, 4, 8, 6, 2, torch.float32, "B")
    with pytest.raises(
        ValueError, match=r"x \[11, 8\] has 11 rows, which 3 clients cannot share evenly"
    ):
        lora_linear(x[:11], W, A, B, 1.0)
    with pytest.raises(ValueError, match=r"lora_A \[2, 8\] trains, so 3 clients need one each"):
        lora_linear(x, W, A.requires_grad_(), B, 1.0)
    with pytest.raises(ValueError, match="must all be common to the clients or all have 3 of them"):
        grouped_lora_linear(x, [W, W], [A.detach()] * 2, [B, B[0]], [1.0, 1.0], [None, None])
    with pytest.raises(ValueError, match="shapes do not fit"):
        lora_linear(x, W, A.detach(), B[:, :5], 1.0)
    for backend in ("triton[base_dx:tma]", "reference"):
        try:
            with (
                pytest.raises(
                    BackendUnavailable, match="it has no client axis, and 3 clients were given"
                ),
                use_backend(backend),
            ):
                lora_linear(x, W, A.detach(), B, 1.0)
        except BackendUnavailable as error:
            assert "not installed" in str(error)
    explain(clear=True)
    lora_linear(x, W, A.detach(), B, 1.0)
    assert [(c.backend, c.reason) for c in explain(clear=True)] == [
        ("torch", "the client axis has no measured table")
    ]
