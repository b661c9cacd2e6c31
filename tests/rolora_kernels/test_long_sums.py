"""An fp32 sum over thousands of terms, added one after another as a GPU's fused multiply-adds do."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import triton_ops
from tests.rolora_kernels.judges import GATES, rms

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the interpreter",
)
LONG = 11_008  # Llama-2-7B's widest


def chained(a, b, acc):
    """acc + a b in fp32, term by term."""
    acc = acc.astype(np.float32)
    for k in range(a.shape[1]):
        acc = acc + a[:, k, None].astype(np.float32) * b[None, k].astype(np.float32)
    return acc


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The interpreter's products are BLAS's, which add in parts of their own."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(chained(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def results(K):
    """error of each product that adds K terms"""
    torch.manual_seed(0)
    x, W, A = torch.randn(6, K), torch.randn(8, K) / K**0.5, torch.randn(4, K) / K**0.5
    S, B, T = torch.randn(6, 4), torch.randn(8, 4), torch.randn(6, 4)
    dy, V, C = torch.randn(6, K), torch.randn(K, 8) / K**0.5, torch.randn(4, 8)
    as64 = [t.double().numpy() for t in (x, W, A, S, B, T, dy, V, C)]
    x64, W64, A64, S64, B64, T64, dy64, V64, C64 = as64
    return {
        "shrink": rms(triton_ops.shrink(x, A), x64 @ A64.T),
        "expand_base": rms(
            triton_ops.expand_base(x, W, S, B, 0.1, None), x64 @ W64.T + 0.1 * S64 @ B64.T
        ),
        "base_dx": rms(triton_ops.base_dx([dy], [V], 0.1 * T, C), dy64 @ V64 + 0.1 * T64 @ C64),
    }


def test_the_judge_sees_a_chain(as_on_a_gpu, monkeypatch):
    a, b = torch.randn(6, LONG).numpy(), torch.randn(LONG, 8).numpy()
    found = torch.from_numpy(chained(a, b, np.zeros((6, 8))))
    assert rms(found, a.astype(float) @ b.astype(float)) > 1e-6


def test_long_sums_are_made_in_parts(as_on_a_gpu):
    for name, error in results(LONG).items():
        assert error < 0.5 * GATES[torch.float32][0], (name, error)


@pytest.mark.parametrize("K", [1024, 1040])
def test_a_part_that_is_just_full_or_nearly_is_counted_once(K):
    for name, error in results(K).items():
        assert error < 1e-6, (name, error)
