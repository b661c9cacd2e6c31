"""The traffic that our kernels declare is what they do: addresses touched in the interpreter, byte
for byte.
"""

import os
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks import traffic
from rolora_kernels import lora_linear, use_backend
from rolora_kernels.triton_ops.launch import WITHOUT_A_GPU
from tests.rolora_kernels.judges import problem


class Touched:
    """Unique bytes loaded and stored by every launch inside the context."""

    def __init__(self):
        self.launches, self.read, self.written = 0, 0, 0

    def __enter__(self):
        from triton.runtime import interpreter

        loads, stores, executor = [], [], interpreter.GridExecutor
        builder = interpreter.InterpreterBuilder
        load, store, call = (
            builder.create_masked_load,
            builder.create_masked_store,
            executor.__call__,
        )

        def record(into, ptrs, mask):
            width = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
            into.append((width, ptrs.data[mask.data.astype(bool)].ravel()))

        def spy_load(this, ptrs, mask, *rest):
            record(loads, ptrs, mask)
            return load(this, ptrs, mask, *rest)

        def spy_store(this, ptrs, value, mask, *rest):
            record(stores, ptrs, mask)
            return store(this, ptrs, value, mask, *rest)

        def unique(addresses):
            return sum(
                width * len(np.unique(np.concatenate([a for w, a in addresses if w == width])))
                for width in {w for w, _ in addresses}
            )

        def launch(this, *args, **kwargs):
            loads.clear(), stores.clear()
            result = call(this, *args, **kwargs)
            self.launches, self.read, self.written = (
                self.launches + 1,
                self.read + unique(loads),
                self.written + unique(stores),
            )
            return result

        self.patches = [
            mock.patch.object(builder, "create_masked_load", spy_load),
            mock.patch.object(builder, "create_masked_store", spy_store),
            mock.patch.object(executor, "__call__", launch),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exc):
        for patch in self.patches:
            patch.stop()


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="addresses are seen in the interpreter only"
)
@pytest.mark.parametrize("phase", ["A", "B", "BOTH"])
@pytest.mark.parametrize(
    "shape", [(40, 48, 32, 4), (70, 33, 300, 16), (1030, 20, 24, 3), (30, 1100, 1040, 5)], ids=str
)
def test_declared_traffic_is_real(shape, phase):
    M, K, N, r = shape
    x, W, A, B, _, dy = problem(*shape, torch.bfloat16)
    x.requires_grad_(), A.requires_grad_(phase != "B"), B.requires_grad_(phase != "A")
    with use_backend("triton"), Touched() as touched:
        lora_linear(x, W, A, B, 1.0).backward(dy)
    declared = traffic.ours(M, K, N, r, phase, multiprocessors=WITHOUT_A_GPU)
    assert (touched.launches, touched.read, touched.written) == (
        declared.launches,
        declared.read,
        declared.written,
    )


@pytest.mark.parametrize(
    "phase, launches, floor", [("B", 5, (2, 2)), ("A", 6, (4, 2)), ("BOTH", 7, (4, 2))]
)
def test_targets_at_rank_16(phase, launches, floor):
    """The target: extra bytes ≤ 1.2 × the floor, partials included, at Llama-2-7B's shapes;
    launches ≤ 5 / 6 / 7.
    """
    for N, K in ((4096, 4096), (11008, 4096), (4096, 11008)):
        count = traffic.ours(8192, K, N, 16, phase)
        assert count.launches == launches
        if phase != "BOTH":
            assert count.bytes - traffic.frozen(8192, K, N) <= 1.2 * (
                floor[0] * 8192 * K + floor[1] * 8192 * N
            )


def test_eager_counting_on_a_case_done_by_hand():
    x, w, y = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(4, 5)

    def step():
        y.addmm_(x, w.t(), beta=0)  # reads x and w, writes y
        return y + y  # reads y once, writes a new one

    count = traffic.eager(step)
    assert (count.launches, count.read, count.written) == (2, 4 * (24 + 30 + 20), 4 * (20 + 20))
