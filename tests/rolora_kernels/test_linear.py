"""The autograd rule against NumPy float64, against autograd, and for what it keeps."""

import gc
import weakref

import numpy as np
import pytest
import torch

from rolora_kernels import explain, grouped_lora_linear, lora_linear, use_backend
from rolora_kernels.dropout import Dropout, keep_mask

GATES = {
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (3e-3, 4e-3),
    torch.float16: (4e-4, 4e-4),
}  # y and dx, dA and dB


def rms(value, truth):
    truth = np.asarray(truth, dtype=np.float64)
    return np.sqrt(np.mean((value.detach().double().numpy() - truth) ** 2) / np.mean(truth**2))


def problem(M, K, N, r, dtype, bias=True):
    x = torch.randn(M, K).to(dtype)
    W, A, B = (
        torch.randn(N, K).to(dtype) / K**0.5,
        torch.randn(r, K) / K**0.5,
        torch.randn(N, r) / r**0.5,
    )
    return x, W, A, B, torch.randn(N).to(dtype) if bias else None, torch.randn(M, N).to(dtype)


def numpy_judge(x, W, A, B, s, bias, dy, mask=1.0):
    """Every result by its formula in NumPy float64, on the factors as rounded to x's dtype."""
    x, W, dy = (t.double().numpy() for t in (x, W, dy))
    dropped = x * mask
    S, T = dropped @ A.T, s * dy @ B
    y = x @ W.T + s * S @ B.T + (0 if bias is None else bias.double().numpy())
    return {"y": y, "dx": dy @ W + (T @ A) * mask, "dA": T.T @ dropped, "dB": s * dy.T @ S}


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


class Kept:
    """Unique storages saved for backward that are not parameters."""

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def _pack(self, t):
        self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def __exit__(self, *exc):
        self.hooks.__exit__(*exc)

    def bytes_beyond(self, *parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters if p is not None}
        return sum(n for pointer, n in self.storages.items() if pointer not in own)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_linear_and_keeps_16_bits(dtype):
    x, W, A, B, bias, _ = problem(33, 64, 48, 4, torch.float32)
    A.requires_grad_(), x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype), Kept() as kept:
        y = lora_linear(x, W, A, B, 1.0, bias)
    assert y.dtype == dtype and kept.bytes_beyond(W, A, B) == 2 * x.numel(), (
        "W must not be kept as a 16-bit copy"
    )
    y.float().sum().backward()
    low = x.detach().to(dtype).double()
    A64 = A.detach().to(dtype).double()
    truth = (
        low @ W.to(dtype).double().t() + low @ A64.t() @ B.to(dtype).double().t() + bias.double()
    )
    assert rms(y, truth.numpy()) <= GATES[dtype][0]
    assert x.grad.dtype == A.grad.dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_rate_scale_and_independence(p):
    key = torch.tensor(-5)
    keep = keep_mask(range(400), 257, Dropout(p, key))
    if p == 1.0:
        assert not keep.any()
        return
    n = keep.numel()
    assert abs(keep.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    other = keep_mask(range(400), 257, Dropout(p, torch.tensor(-4)))
    for a, b in ((keep, other), (keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1])):
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / n**0.5
    assert torch.equal(keep_mask(range(7, 9), 257, Dropout(p, key)), keep[7:9]), (
        "the counter is the row, whatever the chunk"
    )


def philox_in_python(c0: int, c1: int, key: int, rounds: int) -> list[int]:
    """Philox-4x32 on the counter (c0, c1, 0, 0), word by word as Salmon et al. write it."""
    x, k0, k1 = [c0, c1, 0, 0], key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ x[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def test_philox_is_philox():
    """The known answers of Philox-4x32 (Random123's kat_vectors) for a counter and a key of zero,
    ten rounds and seven; then ours at other counters and keys.
    """
    from rolora_kernels.dropout import philox

    assert philox_in_python(0, 0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_in_python(0, 0, 0, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    for c0, c1, key in ((0, 0, 0), (1, 2, 3), (2**31, 2**32 - 1, -(2**62) + 12345)):
        words = philox(torch.tensor([c0]), torch.tensor([[c1]]), torch.tensor(key))
        assert [int(word) for word in words] == philox_in_python(c0, c1, key % 2**64, 7)


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
def test_a_mask_is_a_lane_of_16_bits_against_p(p):
    key = -987654321
    dropped_lanes = max(1, round(p * 65536))
    dropout = Dropout(p, torch.tensor(key))
    kept = keep_mask(range(3, 6), 21, dropout)
    for row in range(3):
        for column in range(21):
            word = philox_in_python(column // 8, row + 3, key % 2**64, 7)[column % 8 // 2]
            lane = (word >> 16) if column % 2 else (word & 0xFFFF)
            signed = lane - 65536 if lane >= 32768 else lane
            assert bool(kept[row, column]) == (signed + 32768 >= dropped_lanes)
    # What is kept is scaled by what the mask really keeps: the mean stays what it was.
    assert dropout.scale == (0.0 if p == 1 else 65536 / (65536 - dropped_lanes))


def test_small_steps_are_not_lost_on_a_bf16_base():
    """1000 AdamW steps at lr 1e-5 end where fp32 ends: factors and gradients stay fp32."""
    x, W, A, B, bias, dy = problem(32, 64, 48, 8, torch.bfloat16)
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        factor = B.clone().requires_grad_()
        optimizer = torch.optim.AdamW([factor], lr=1e-5, weight_decay=0.0)
        for _ in range(1000):
            y = lora_linear(x.to(dtype), W.to(dtype), A, factor, 1.0, bias.to(dtype))
            y.backward(dy.to(dtype))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(factor.detach() - B)
    moved = ends[1].pow(2).mean().sqrt()
    assert moved > 5e-3, "the fp32 run must have moved, or the comparison is empty"
    assert (ends[0] - ends[1]).pow(2).mean().sqrt() <= 0.02 * moved


def test_compiles_without_graph_breaks():
    x, W, A, B, bias, dy = problem(24, 32, 16, 4, torch.float32)
    for phase in ("A", "B"):
        torch._dynamo.reset()
        results = []
        for f in (lora_linear, torch.compile(lora_linear, fullgraph=True, backend="aot_eager")):
            xs, As, Bs = x.clone().requires_grad_(), A.clone(), B.clone()
            As.requires_grad_(phase == "A"), Bs.requires_grad_(phase == "B")
            y = f(xs, W, As, Bs, 1.0, bias)
            y.backward(dy)
            results.append((y, xs.grad, (As if phase == "A" else Bs).grad))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled)


def test_trainable_narrows_and_never_widens():
    x, W, A, B, bias, dy = problem(8, 8, 8, 2, torch.float32)
    A.requires_grad_(), B.requires_grad_()
    lora_linear(x, W, A, B, 1.0, trainable="B").backward(dy)
    assert A.grad is None and B.grad is not None
    with pytest.raises(ValueError, match="lora_A, which does not require grad"):
        lora_linear(x, W, A.detach(), B, 1.0, trainable="BOTH")
    with pytest.raises(ValueError, match="trainable must be one of"):
        lora_linear(x, W, A, B, 1.0, trainable="C")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.randn(4, 9)), r"x \[4, 9\], weight \[6, 8\]"),
        (dict(B=torch.randn(6, 3)), r"lora_A \[2, 8\], lora_B \[6, 3\]"),
        (dict(bias=torch.randn(8)), r"bias \[8\]"),
        (dict(x=torch.randn(4, 8).bfloat16()), "bfloat16 but weight is torch.float32"),
        (dict(x=torch.ones(4, 8, dtype=torch.int64)), "floating point"),
        (dict(W=torch.randn(6, 8, requires_grad=True)), "frozen"),
        (dict(W=torch.randn(6, 8, device="meta")), "different devices"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_operands_are_named_before_anything_runs(change, message):
    given = (
        dict(
            x=torch.randn(4, 8),
            W=torch.randn(6, 8),
            A=torch.randn(2, 8),
            B=torch.randn(6, 2),
            bias=None,
        )
        | change
    )
    with pytest.raises(ValueError, match=message):
        lora_linear(given["x"], given["W"], given["A"], given["B"], 1.0, given["bias"])


def test_dropout_needs_a_key_and_a_probability():
    x, W, A, B, _, _ = problem(2, 8, 8, 2, torch.float32)
    with pytest.raises(ValueError, match="needs dropout_key"):
        lora_linear(x, W, A, B, 1.0, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        lora_linear(x, W, A, B, 1.0, dropout_p=1.5, dropout_key=1)


def test_explain_says_what_ran_and_use_backend_forces_it():
    x, W, A, B, _, _ = problem(5, 8, 6, 2, torch.float32)
    explain(clear=True)
    y = lora_linear(x, W, A, B, 1.0)
    with use_backend("reference"):
        torch.testing.assert_close(lora_linear(x, W, A, B, 1.0), y)
    taken = explain(clear=True)
    assert [(c.backend, c.calls, c.shape) for c in taken] == [
        ("torch", 1, "M=5 K=8 N=6 r=2"),
        ("reference", 1, "M=5 K=8 N=6 r=2"),
    ]
    assert taken[1].reason == "forced by use_backend" and explain() == []
    with (
        pytest.raises(ValueError, match="'cuda-magic' is not torch, triton"),
        use_backend("cuda-magic"),
    ):
        pass
