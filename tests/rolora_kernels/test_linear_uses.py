"""The operation as programs use it: odd operands, autocast, dropout, compilation, and one line for what does not fit."""

import numpy as np
import pytest
import torch

from rolora_kernels import explain, lora_linear, use_backend
from rolora_kernels.dropout import Dropout, keep_mask
from tests.rolora_kernels.judges import GATES, Kept, problem, rms


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
