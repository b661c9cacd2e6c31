"""One of the processes that compile for kernels: runs its share of the units on tensors without
data, where a launch only compiles.

    python -m benchmarks.gpu.compiler ARCH PROCESSES NUMBER
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu import parts
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.results import Results
from benchmarks.gpu.sizes import FULL
from benchmarks.gpu.supervisor import end_with_parent

PARTS = ("check", "primitive", "layer", "nf4")  # the others launch nothing of ours, or the same
MULTIPROCESSORS = 132  # an H100's, an H200's


class NoDevice:
    """Triton's driver where there is no GPU: names the target, and launches nothing."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def only_compile(arch: int) -> None:
    """From now on launches on "meta" tensors compile for an architecture, and do no more."""
    import triton
    from triton.runtime import jit

    from rolora_kernels.triton_ops import launch
    from rolora_kernels.triton_ops.spec import Spec

    triton.runtime.driver.set_active(NoDevice(arch))
    run, shipped, capability = jit.JITFunction.run, Spec.shipped, (arch // 10, arch % 10)

    def compiled(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def for_arch(self, width, rank_block=0, _=None, dropout=False):
        return shipped(self, width, rank_block, capability, dropout)

    jit.JITFunction.run = compiled
    Spec.shipped = for_arch
    launch.runs_on = lambda x: None
    torch.is_autocast_enabled = lambda device=None: False  # it knows no such device
    launch.WITHOUT_A_GPU = MULTIPROCESSORS


def main() -> None:
    end_with_parent()
    arch, processes, number = map(int, sys.argv[1:])
    only_compile(arch)
    about = {"gpu": None, "capability": None, "commit": "", "l2_bytes": 0, "smoke": False}
    with tempfile.TemporaryDirectory() as folder:
        bench = Compiling(Results(Path(folder), about), "meta", 1e6, None)
        bench.table_name = "meta"
        wanted = [unit for unit in parts.units(FULL) if unit.part in PARTS]
        for unit in wanted[number::processes]:
            bench.do(unit)


class Compiling(Bench):
    """A bench whose contenders are called once, and fail where they want a number."""

    def copies(self, nbytes: int) -> int:
        return 1

    def _rotate(self, *given) -> dict:
        return {}


if __name__ == "__main__":
    main()
