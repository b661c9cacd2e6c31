"""Blocks of a multiprocessor, by hand from the CUDA programming guide's table."""

import pytest

from rolora_kernels.occupancy import LIMITS, blocks


@pytest.mark.parametrize(
    "arch, threads, registers, shared, columns, held",
    [
        (80, 128, 32, 0, 0, 16),  # 64 warps
        (86, 128, 32, 0, 0, 12),  # 48 warps
        (86, 32, 16, 0, 0, 16),  # blocks
        (80, 256, 64, 0, 0, 4),  # 65,536 registers: 4 × 16,384
        (80, 256, 65, 0, 0, 3),  # 72 a thread are given out
        (90, 256, 255, 0, 0, 1),
        (90, 256, 96, 98_304, 0, 2),  # 2 × 97 of 228 KiB
        (80, 256, 96, 98_304, 0, 1),  # 164 KiB
        (90, 256, 178, 229_408, 0, 1),
        (90, 256, 178, 241_696, 0, 0),  # not even one
        (100, 256, 64, 10_000, 128, 4),  # 512 columns of tensor memory
    ],
)
def test_what_runs_out_first(arch, threads, registers, shared, columns, held):
    assert blocks(arch, threads, registers, shared, columns) == held


def test_a_block_may_opt_in_to_all_but_what_is_reserved():
    kib = {arch: limits.shared_of_a_block / 1024 for arch, limits in LIMITS.items()}
    assert kib == {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
