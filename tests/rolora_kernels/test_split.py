"""A shrink whose rows leave most multiprocessors without work is split along K, in a fixed order."""

import os
import sys

import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import triton_ops
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.triton_ops import launch
from tests.rolora_kernels.judges import GATES, rms

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="a device of as many multiprocessors as are wanted",
)


@pytest.fixture
def device_of(monkeypatch):
    """Makes the interpreter a device of so many multiprocessors; grids of the launches, which only
    `compute` if told to.
    """

    def install(count, compute=True):
        grids = []
        run = launch.launch

        def record(spec, config, grid, *operands, **switches):
            grids.append((spec.kernel.__name__, grid))
            if compute:
                run(spec, config, grid, *operands, **switches)

        launch.multiprocessors.cache_clear()
        monkeypatch.setattr(launch, "WITHOUT_A_GPU", count)
        for module in ("shrink", "grads_of_dy", "reduce"):
            where = sys.modules[f"rolora_kernels.triton_ops.{module}"]
            monkeypatch.setattr(where, "launch", record)
        return grids

    yield install
    launch.multiprocessors.cache_clear()


@pytest.mark.parametrize(
    "dtype, p", [(torch.float32, 0.3), (torch.bfloat16, 0.0), (torch.float16, 0.3)], ids=str
)
@pytest.mark.parametrize("M, K, r, clients", [(70, 1300, 5, 0), (9, 1111, 70, 0), (8, 1040, 3, 2)])
def test_parts_of_k_add_up_to_what_float64_says(M, K, r, clients, p, dtype, device_of, request):
    grids = device_of(132)
    request.getfixturevalue("poisoned_empty")
    x, A = torch.randn(M, K).to(dtype), torch.randn(*[clients] * (clients > 0), r, K) / K**0.5
    dropout, kept = None, 1.0
    if p:
        dropout = Dropout(p, torch.tensor(5))
        if clients:
            keys = torch.full((M,), 5), torch.arange(M)
            dropout = Dropout(p, *keys)
        kept = keep_mask(range(M), K, dropout).double().numpy() / (1 - round(p * 2**16) / 2**16)
    first = triton_ops.shrink(x, A, dropout)
    X, factor = x.double().numpy() * kept, A.to(dtype).double().numpy()
    truth = X @ factor.T if not clients else (X.reshape(clients, -1, K) @ factor.mT).reshape(M, r)
    assert rms(first, truth) <= GATES[dtype][0]
    (shrink, (_, blocks, _)), (reduce, _) = grids
    assert (shrink, reduce) == ("shrink_kernel", "sum_partials_kernel")
    assert blocks > (2 if r > 64 else 1)  # blocks of ranks, times splits
    assert torch.equal(first, triton_ops.shrink(x, A, dropout))  # no order but one


def test_it_is_split_where_two_thirds_of_the_device_would_idle(device_of):
    """44 of 132 multiprocessors at most have work, and a part has four steps of 128 at least."""
    grids = device_of(132, compute=False)
    A = torch.randn(4, 2048)
    splits = []
    for rows, K in ((44 * 64, 2048), (45 * 64, 2048), (64, 2048), (64, 1023), (64, 896)):
        triton_ops.shrink(torch.empty(rows, K).bfloat16(), A[:, :K])
        splits.append(next(grid[1] for name, grid in reversed(grids) if name == "shrink_kernel"))
    assert splits == [3, 1, 4, 2, 1]


@pytest.mark.parametrize(
    "M, r, walked", [(65536, 16, 1024), (8192, 16, 512), (2048, 16, 256), (2048, 40, 1024)]
)
def test_rows_are_fewer_where_a_third_of_the_device_would_idle(M, r, walked, device_of):
    """Of 8192 × 4096 a stripe of 1024 rows would make 64 programs for 132 multiprocessors. Ranks of
    40 take a block of 64, whose partials of 1024 rows are a quarter of what is read.
    """
    grids = device_of(132, compute=False)
    dy, S = torch.empty(1, 1).bfloat16().expand(M, 4096), torch.empty(1, 1).bfloat16().expand(M, r)
    triton_ops.grads_of_dy(dy, torch.empty(4096, r), S, 1.0)
    (_, (stripes, _, _)), (reduce, _) = grids
    assert (stripes, reduce) == (M // walked, "sum_partials_kernel")


def test_t_alone_is_written_into_a_view(device_of):
    """T of one linear is a part of a group's buffer."""
    device_of(132)
    dy, B, T = torch.randn(40, 1200).bfloat16(), torch.randn(1200, 3), torch.zeros(40, 7).bfloat16()
    triton_ops.grads_of_dy(dy, B, None, 0.7, T[:, 2:5])
    truth = 0.7 * dy.double().numpy() @ B.bfloat16().double().numpy()
    assert rms(T[:, 2:5], truth) <= 3e-3 and not T[:, [0, 1, 5, 6]].any()
