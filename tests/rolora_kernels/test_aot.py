"""Tier 3: shipped configurations compiled for real architectures, in a process of its own, because
the interpreter's functions cannot be compiled.
"""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_architecture_compiles_without_stack_frames_and_with_tensor_cores():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "rolora_kernels.aot", "--type", "bf16", "--type", "fp32"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {row[0] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row[0] for row in rows if row[1] == "base_tma_dx"} == {"sm_90", "sm_100", "sm_120"}
    for arch, kernel, dtype, _, _, stack, _, mma in rows:
        assert stack == "0"
        if kernel in ("reduce", "dropped", "dequantise_nf4", "pack", "pack_int8"):
            assert "mma" not in mma and (
                kernel != "dequantise_nf4" or "fma" not in mma
            )  # roundings of 4-bit weights are not fused
            continue
        if kernel.startswith("base_tma"):
            assert "tma" in mma.split("+") and ("specialised" in mma) == (arch == "sm_90")
        if dtype == "fp32":
            assert "tf32" not in mma
        else:
            wanted = {"sm_90": "wgmma", "sm_100": "tcgen05|mma.sync"}.get(arch, "mma.sync")
            assert re.search(wanted, mma), (arch, kernel, mma)
