"""The autograd rule against NumPy float64, against autograd, and for what it keeps."""

import gc
import weakref

import pytest
import torch

from rolora_kernels import grouped_lora_linear, lora_linear
from rolora_kernels.dropout import Dropout, keep_mask
from tests.rolora_kernels.judges import GATES, Kept, numpy_judge, problem, rms


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 24, 1),
        (63, 100, 72, 4),
        (1000, 130, 250, 8),
        (257, 96, 64, 12),
        (128, 300, 80, 64),
        (40, 260, 256, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
def test_against_numpy_float64(shape, dtype, phase, poisoned_empty):
    x, W, A, B, bias, dy = problem(*shape, dtype)
    scaling = 0.7
    truth = numpy_judge(
        x, W, A.to(dtype).double().numpy(), B.to(dtype).double().numpy(), scaling, bias, dy
    )
    x.requires_grad_()
    A.requires_grad_(phase != "B"), B.requires_grad_(phase != "A")
    y = lora_linear(x, W, A, B, scaling, bias)
    y.backward(dy)
    outer, factor = GATES[dtype]
    assert rms(y, truth["y"]) <= outer and rms(x.grad, truth["dx"]) <= outer
    assert y.dtype == x.grad.dtype == dtype
    if phase != "B":
        assert A.grad.dtype == torch.float32 and rms(A.grad, truth["dA"]) <= factor
    if phase != "A":
        assert B.grad.dtype == torch.float32 and rms(B.grad, truth["dB"]) <= factor
    assert (
        (A.grad is None) == (phase == "B") and (B.grad is None) == (phase == "A") and W.grad is None
    )


def test_gradients_match_finite_differences():
    x, W, A, B, bias, _ = problem(5, 7, 6, 3, torch.float64)
    inputs = [t.double().requires_grad_() for t in (x, A, B)]
    for p in (0.0, 0.4):
        assert torch.autograd.gradcheck(
            lambda x, A, B, p=p: lora_linear(x, W, A, B, 1.3, bias, dropout_p=p, dropout_key=7),
            inputs,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_larger_than_the_plain_composition(dtype):
    """Ours ≤ 1.05 × the error of the composition that PEFT computes, on the same inputs in the same
    dtype.
    """
    x, W, A, B, bias, dy = problem(512, 384, 256, 16, dtype)
    A, B = A.to(dtype).float(), B.to(dtype).float()
    truth = numpy_judge(x, W, A.double().numpy(), B.double().numpy(), 2.0, bias, dy)

    def run(f, A, B):
        xs = x.clone().requires_grad_()
        A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
        y = f(xs, A, B)
        y.backward(dy)
        return {"y": y, "dx": xs.grad, "dA": A.grad, "dB": B.grad}

    linear = torch.nn.functional.linear
    ours = run(lambda x, A, B: lora_linear(x, W, A, B, 2.0, bias), A, B)
    plain = run(
        lambda x, A, B: linear(x, W, bias) + linear(linear(x, A), B) * 2.0, A.to(dtype), B.to(dtype)
    )
    for name, value in truth.items():
        assert rms(ours[name], value) <= 1.05 * rms(plain[name], value), name


@pytest.mark.parametrize(
    "phase, expected", [("B", "S"), ("A", "X"), ("BOTH", "S and X"), (None, "nothing")]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_phase_keeps_only_what_it_needs(phase, expected, p):
    M, K, N, r = 64, 48, 40, 4
    x, W, A, B, bias, _ = problem(M, K, N, r, torch.bfloat16)
    A.requires_grad_(phase in ("A", "BOTH")), B.requires_grad_(phase in ("B", "BOTH"))
    x.requires_grad_()
    key = torch.tensor(3)
    hidden = x * 1.0  # an activation: autograd keeps it only if somebody saves it
    died = weakref.ref(hidden)
    with Kept() as kept:
        y = lora_linear(hidden, W, A, B, 1.0, bias, dropout_p=p, dropout_key=key)
    size = {"S": 2 * M * r, "X": 2 * M * K, "S and X": 2 * M * (r + K), "nothing": 0}[expected]
    size += M * K if p else 0  # a CPU keeps the mask, a byte an element
    assert kept.bytes_beyond(W, A, B, bias, key) == size
    del hidden
    gc.collect()
    assert (died() is None) == (phase in ("B", None)), "phase B must let the input go"
    y.sum().backward()


def test_nothing_is_computed_that_nobody_asked_for():
    """The GEMMs of a backward, counted: no dX for a leaf input without grad, T once, no gradient of
    a frozen factor.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (
                torch.ops.aten.mm.default,
                torch.ops.aten.addmm_.default,
                torch.ops.aten.addmm.default,
            ):
                self.shapes.append(tuple(func(*args, **(kwargs or {})).shape))
            return func(*args, **(kwargs or {}))

    M, K, N, r = 32, 40, 24, 3
    # shapes written by backward's GEMMs: T and dB as their transposes, dx twice (base, then LoRA),
    # dA
    expected = {
        ("B", True): [(r, M), (r, N), (M, K), (M, K)],
        ("B", False): [(r, N)],
        ("A", True): [(r, M), (M, K), (M, K), (r, K)],
        ("A", False): [(r, M), (r, K)],
        ("BOTH", True): [(r, M), (r, N), (M, K), (M, K), (r, K)],
    }
    for (phase, need_x), shapes in expected.items():
        x, W, A, B, bias, dy = problem(M, K, N, r, torch.float32)
        A.requires_grad_(phase != "B"), B.requires_grad_(phase != "A"), x.requires_grad_(need_x)
        y = lora_linear(x, W, A, B, 1.0, bias)
        with Count() as count:
            count.shapes = []
            y.backward(dy)
        assert sorted(count.shapes) == sorted(shapes), (phase, need_x)


@pytest.mark.parametrize("dtype", GATES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_group_equals_its_linears(dtype, p):
    K, sizes, ranks = 64, (48, 16, 32), (8, 4, 8)
    x = torch.randn(2, 33, K).to(dtype).requires_grad_()
    Ws = [torch.randn(n, K).to(dtype) / 8 for n in sizes]
    As = [(torch.randn(r, K) / 8).requires_grad_() for r in ranks]
    Bs = [torch.randn(n, r).requires_grad_() for n, r in zip(sizes, ranks, strict=True)]
    biases = [torch.randn(sizes[0]).to(dtype), None, torch.randn(sizes[2]).to(dtype)]
    key = torch.tensor(99)
    grouped = grouped_lora_linear(
        x, Ws, As, Bs, [1.0, 2.0, 0.5], biases, dropout_p=p, dropout_key=key
    )
    dys = [torch.randn_like(y) for y in grouped]
    torch.autograd.backward(grouped, dys)
    got = [x.grad, *(t.grad for t in As + Bs)]

    # Judges: float64, each linear by itself through autograd; and the same composition in the same
    # dtype.
    mask = (
        keep_mask(range(66), K, Dropout(p, key)).view(2, 33, K).double() / (1 - p)
        if p
        else torch.ones((), dtype=torch.double)
    )

    def composition(dtype):
        leaves = [t.detach().to(grouped[0].dtype).to(dtype).requires_grad_() for t in [x, *As, *Bs]]
        ys = []
        for g in range(3):
            y = leaves[0] @ Ws[g].to(dtype).t()
            y = y if biases[g] is None else y + biases[g].to(dtype)
            path = (leaves[0] * mask.to(dtype)) @ leaves[1 + g].t() @ leaves[4 + g].t()
            ys.append(y + [1.0, 2.0, 0.5][g] * path)
        torch.autograd.backward(ys, [dy.to(dtype) for dy in dys])
        return [*ys, *(leaf.grad for leaf in leaves)]

    for ours, plain, truth in zip(
        [*grouped, *got], composition(dtype), composition(torch.float64), strict=True
    ):
        assert rms(ours, truth.detach().numpy()) <= max(
            1.05 * rms(plain, truth.detach().numpy()), GATES[dtype][0]
        )


def test_a_group_with_an_unused_output_and_one_trained_factor():
    x = torch.randn(9, 20, requires_grad=True)
    Ws, As = (
        [torch.randn(12, 20), torch.randn(8, 20)],
        [torch.randn(3, 20), torch.randn(2, 20, requires_grad=True)],
    )
    Bs = [torch.randn(12, 3, requires_grad=True), torch.randn(8, 2)]
    _, y = grouped_lora_linear(x, Ws, As, Bs, [1.0, 1.0], [None, None])
    y.sum().backward()
    clone = x.detach().clone().requires_grad_()
    A = As[1].detach().clone().requires_grad_()
    (clone @ Ws[1].t() + clone @ A.t() @ Bs[1].t()).sum().backward()
    torch.testing.assert_close(x.grad, clone.grad)
    torch.testing.assert_close(As[1].grad, A.grad)
    assert As[0].grad is None and Bs[0].grad is None and Bs[1].grad is None


def test_any_strides_and_leading_dimensions():
    x = torch.randn(6, 3, 5, 20).transpose(0, 2)[:, ::1]
    W = torch.randn(20, 12).t()  # a Conv1D's view
    A, B = torch.randn(20, 8).t()[:4], torch.randn(12, 8)[:, ::2]
    y = lora_linear(x, W, A, B, 1.5)
    torch.testing.assert_close(y, x @ W.t() + 1.5 * x @ A.t() @ B.t(), rtol=1e-4, atol=1e-4)
    assert y.shape == (5, 3, 6, 12)


def test_outputs_survive_in_place_operations():
    x, W, A, B, bias, _ = problem(4, 8, 6, 2, torch.float32)
    A.requires_grad_(), x.requires_grad_()
    y = lora_linear(x.view(2, 2, 8), W, A, B, 1.0, bias)
    y.mul_(2.0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (torch.ones(4, 6) @ (W + B @ A.detach())))


def test_a_frozen_weight_object_computes_as_its_tensor():
    """The interface that quantised weights use: asked for dense values in forward and again in
    backward, never saved.
    """
    from rolora_kernels import Dense, FrozenWeight

    class Halved:
        """Stores 2 W; counts how often it is asked."""

        asked, dtype = 0, None

        def __init__(self, W):
            self.stored, self.shape, self.device = 2 * W, W.shape, W.device

        def dequantise(self, dtype, out=None):
            self.asked += 1
            return (self.stored / 2).to(dtype)

    x, W, A, B, bias, dy = problem(12, 20, 14, 3, torch.float32)
    results = []
    for weight in (W, Dense(W), Halved(W)):
        assert isinstance(weight, torch.Tensor) or isinstance(weight, FrozenWeight)
        xs, As = x.clone().requires_grad_(), A.clone().requires_grad_()
        with Kept() as kept:
            y = lora_linear(xs, weight, As, B, 1.0, bias)
        assert kept.bytes_beyond(W, As, B, bias) == 4 * x.numel()
        y.backward(dy)
        results.append((y.detach(), xs.grad, As.grad))
    assert weight.asked == 2
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_empty_batch():
    x, W, A, B, bias, _ = problem(0, 8, 6, 2, torch.float32)
    for t in (x, A, B):
        t.requires_grad_()
    y = lora_linear(x, W, A, B, 1.0, bias)
    y.sum().backward()
    assert y.shape == (0, 6) and A.grad.abs().sum() == 0 and B.grad.abs().sum() == 0
