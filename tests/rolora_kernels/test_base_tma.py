"""The frozen product on TMA, in the interpreter: every tile that tune tries, ranks of one block and
of several, masks, and groups, against float64.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from rolora_kernels import triton_ops, tuned
from rolora_kernels.dropout import Dropout, keep_mask
from rolora_kernels.triton_ops import base_tma
from tests.rolora_kernels.judges import rms

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the table is one of the interpreter's",
)
M, K, N = 70, 72, 272  # a second tile of 256 columns, all of its right half outside


@pytest.fixture
def tiles():
    """Makes launches take a configuration."""

    def install(**config):
        rows = [
            {
                "primitive": name,
                "dtype": "bfloat16",
                "rank": 16,
                "sizes": [1, 1, 1],
                "winner": "tma",
            }
            | {"dropout": dropout, "configs": {"tma": config}}
            for name in ("expand_base", "base_dx")
            for dropout in (False, True)
        ]
        tuned.install({"gpu": "none", "capability": [9, 0], "rows": rows}, "cpu")

    yield install
    tuned.install({}, "cpu")


def operands(r):
    """x, W, A, B, dy, S, T: the factors fp32, the rest bf16."""
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r) / r**0.5
    W = (torch.randn(N, K) / K**0.5).bfloat16()
    return x, W, A, B, dy, torch.randn(M, r).bfloat16(), torch.randn(M, r).bfloat16()


def wide(*tensors):
    return [t.double().numpy() for t in tensors]


@pytest.mark.parametrize("r", [3, 16, 40])
@pytest.mark.parametrize("columns", [128, 256])
def test_both_directions_are_what_float64_says(tiles, poisoned_empty, columns, r):
    tiles(BLOCK_N=columns)
    x, W, A, B, dy, S, T = operands(r)
    bias = torch.randn(N).bfloat16()
    y = triton_ops.expand_base(x, W, S, B, 0.7, bias, tma=True)
    X, W64, A64, B64, dY, S64, T64, b = wide(x, W, A, B, dy, S, T, bias)
    assert rms(y, X @ W64.T + 0.7 * S64 @ B64.T + b) <= 3e-3
    dx = triton_ops.base_dx([dy, dy], [W, W], T, A, tma=True)
    assert rms(dx, 2 * dY @ W64 + T64 @ A64) <= 3e-3
    drop = Dropout(0.3, torch.tensor(5))
    masked = triton_ops.base_dx([dy], [W], T, A, drop, tma=True)
    kept = keep_mask(range(M), K, drop).numpy()
    assert 0.6 < kept.mean() < 0.8
    assert rms(masked, dY @ W64 + kept * (T64 @ A64) / 0.7) <= 3e-3


def test_a_scaling_is_applied_before_the_one_rounding_of_a_factor(tiles):
    """Without W all of the error is that of rounding s · B, and Y: no more than NumPy makes."""
    x, W, _, B, _, S, _ = operands(16)
    tiles(BLOCK_N=256)
    ours = triton_ops.expand_base(x, 0 * W, S, B, 0.7, None, tma=True)
    S64, B64 = wide(S, B)
    truth = 0.7 * S64 @ B64.T
    (factor,) = wide(torch.from_numpy(0.7 * B64).bfloat16())
    once = torch.from_numpy(S64 @ factor.T).bfloat16()
    assert rms(ours, truth) <= 1.02 * rms(once, truth)


def test_warp_groups_are_for_ranks_of_one_block(tiles, monkeypatch):
    """Triton compiles none for a loop over ranks after that over K."""
    tiles(BLOCK_N=256, SPECIALISED=1, num_warps=4)
    launched, launch = [], base_tma.launch

    def record(spec, config, grid, *operands, **switches):
        launched.append((config.SPECIALISED, config.num_warps, switches["WALKS"]))
        switches["SPECIALISED"] = False  # the interpreter knows none
        launch(spec, config, grid, *operands, **switches)

    monkeypatch.setattr("rolora_kernels.triton_ops.base_tma.launch", record)
    for r in (16, 17):
        x, W, A, B, dy, S, T = operands(r)
        triton_ops.expand_base(x, W, S, B, 0.7, None, tma=True)
        triton_ops.base_dx([dy], [W], T, A, tma=True)
    assert launched == [(1, 4, False)] * 2 + [(0, 8, True)] * 2
