"""How many blocks of a kernel a multiprocessor holds at a time, from what one block takes.

A block that waits for memory leaves the multiprocessor to the others there; where there is but one,
its own pipeline has to hide the wait. Limits are those of the CUDA programming guide's table of
compute capabilities; registers are given out a warp at a time, in units of 256.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65_536  # of a multiprocessor, on every architecture here
RESERVED = 1024  # bytes of shared memory that the system takes from each block
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, sm_100


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared: int

    @property
    def shared_of_a_block(self) -> int:
        """Bytes that one block may opt in to."""
        return self.shared - RESERVED


LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}


def blocks(arch: int, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Blocks of so many threads, registers a thread and bytes of shared memory that a
    multiprocessor holds; 0 where it has not even one's.
    """
    limits, warps = LIMITS[arch], -(-threads // 32)
    of_a_warp = max(-(-registers * 32 // 256) * 256, 256)
    found = [
        limits.blocks,
        limits.warps // warps,
        REGISTERS // of_a_warp // warps,
        limits.shared // (shared + RESERVED),
    ]
    if tensor_columns:
        found.append(TENSOR_COLUMNS // tensor_columns)
    return min(found)
