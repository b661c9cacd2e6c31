"""Every assumption of the model, in one place: what GPUs do, and which part of it a kernel reaches.

A launch takes as long as the slower of its arithmetic and its traffic, and a gap. Rates are the
vendors' datasheets (dense bf16 with fp32 accumulation, fp32 without tensor cores, memory) times
what a large product or a copy reaches of them. That share was measured on one GPU, an H200: 788 of
989 TFLOP/s, 4.3 of 4.8 TB/s; it stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA = 1e12
GEMM_SHARE = 0.80  # of the datasheet's arithmetic that a product of 8192 × 8192 × 8192 reaches
COPY_SHARE = 0.90  # of the datasheet's bandwidth that a copy of gigabytes reaches
GAP = 2e-6  # seconds from a launch's end to the start of the next one that is queued already


@dataclass(frozen=True)
class Machine:
    """bf16, fp32: FLOP/s; memory: bytes/s; by the datasheet. `capability`: compute capability."""

    name: str
    bf16: float
    fp32: float
    memory: float
    capability: int

    def arithmetic(self, width: int) -> float:
        """FLOP/s of a large product of elements of `width` bytes."""
        return GEMM_SHARE * (self.bf16 if width == 2 else self.fp32)

    def bandwidth(self) -> float:
        """Bytes/s of a copy."""
        return COPY_SHARE * self.memory


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("A100", 312 * TERA, 19.5 * TERA, 2.04 * TERA, 80),
        Machine("H100", 989 * TERA, 67 * TERA, 3.35 * TERA, 90),
        Machine("H200", 989 * TERA, 67 * TERA, 4.8 * TERA, 90),
        Machine("B200", 2250 * TERA, 80 * TERA, 8.0 * TERA, 100),
        Machine("RTX 4090", 165 * TERA, 82.6 * TERA, 1.01 * TERA, 89),
        Machine("L4", 121 * TERA, 30.3 * TERA, 0.3 * TERA, 89),
        Machine("L40S", 362 * TERA, 91.6 * TERA, 0.864 * TERA, 89),
    )
}

# kind of a launch → share of the large product's arithmetic that it reaches, of a copy's bandwidth
SHARES = {
    # a vendor's product at a model's shapes, which are smaller than the large one
    "vendor product": (0.93, 0.85),
    # a vendor's product with a side of a rank: it reads the long side at what was published for
    # such shapes, below a copy
    "vendor skinny": (0.93, 0.75),
    # a vendor's low-rank product added to a matrix in place, one tile at a time
    "vendor added": (0.93, 0.85),
    # element by element: PyTorch's own kernels
    "elementwise": (1.0, 0.92),
    # ours: one walk over the long side
    "our skinny": (0.93, 0.85),
    # ours: the frozen product by descriptors; published kernels reach .86 to 1.02 of the vendor's
    "our TMA product": (0.93 * 0.86, 0.85),
    # ours: the frozen product by pointers, where products are wgmma (sm_90 and later) …
    "our pointer product, wgmma": (0.93 * 0.61, 0.85),
    # … and where they are mma.sync, for which pointers are the usual way
    "our pointer product, mma": (0.93 * 0.90, 0.85),
    # ours: 4-bit codes to a matrix
    "our dequantisation": (1.0, 0.85),
}
