"""Tier 3: shipped configurations compiled for real architectures, in a process of its own, because
the interpreter's functions cannot be compiled.
"""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from rolora_kernels import aot
from rolora_kernels.aot import Form, Row, forms
from rolora_kernels.occupancy import LIMITS
from rolora_kernels.triton_ops.spec import all_specs

NO_MATMUL = ("reduce", "dropped", "dequantise_nf4", "dequantise_nf4_single", "pack", "pack_int8")


# Forms that two tests look at are compiled once.
_COMPILED = """
from rolora_kernels import aot
asked = [*aot.forms(types=("bf16", "fp32")), *aot.forms((80, 90), ("bf16",), every=True)]
raise SystemExit(aot.report(aot.compile_all(list(dict.fromkeys(asked)))))
"""


@pytest.fixture(scope="module")
def rows():
    """The rows that aot prints, split into words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines() if line.startswith("sm_")]


@pytest.mark.slow
def test_every_architecture_compiles_without_stack_frames_and_with_tensor_cores(rows):
    assert {row[0] for row in rows} == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row[0] for row in rows if row[1] == "base_tma_dx"} == {"sm_90", "sm_100", "sm_120"}
    for arch, kernel, dtype, _, _, stack, shared, blocks, mma, _ in rows:
        assert stack == "0" and int(shared) <= LIMITS[int(arch[3:])].shared_of_a_block
        assert int(blocks) >= 1
        if kernel in NO_MATMUL:
            # roundings of 4-bit weights are not fused
            assert "mma" not in mma and (not kernel.startswith("dequantise") or "fma" not in mma)
            continue
        if kernel.startswith("base_tma"):
            assert "tma" in mma.split("+") and "specialised" not in mma
        if dtype == "fp32":
            assert "tf32" not in mma
        else:
            wanted = {"sm_90": "wgmma", "sm_100": "tcgen05|mma.sync"}.get(arch, "mma.sync")
            assert re.search(wanted, mma), (arch, kernel, mma)


@pytest.mark.slow
def test_every_switch_compiles_on_and_off(rows):
    """The oldest architecture and the one with warp groups; dropout with a key a row included."""
    rows = [row for row in rows if row[0] in ("sm_80", "sm_90") and row[2] == "bf16"]
    seen = {(row[0], row[1], row[-1]) for row in rows}
    for arch in ("sm_80", "sm_90"):
        for kernel in ("shrink", "grad_A"):
            for on in ("-", "dropout", "dropout+per_row"):
                assert (arch, kernel, on) in seen
        for on in ("-", "first", "first+dropout", "first+dropout+per_row"):
            assert (arch, "base_dx", on) in seen
    for on in ("transposed+first+dropout", "transposed+first+dropout+walks"):
        assert ("sm_90", "base_tma_dx_masked", on) in seen
    wide = {row[-4] for row in rows if row[0] == "sm_90" and row[1] in ("base_tma", "base_tma_dx")}
    assert wide == {"229408"}  # 128 × 256 in four stages: 232,448 exist


_NOT_SPECIALISED = """
from rolora_kernels.triton_ops.spec import all_specs
for file, spec in all_specs().items():
    print(file, *(p.name for p in spec.kernel.params if p.do_not_specialize))
"""


def test_a_batch_of_another_length_compiles_nothing_anew():
    """What follows from a batch's rows is no reason for another form of a kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _NOT_SPECIALISED],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = {file: names for file, *names in map(str.split, done.stdout.splitlines())}
    by_rows = {name: spec for name, spec in all_specs().items() if "M" in spec.sizes}
    assert len(by_rows) >= 6 and all("M" in found[name] for name in (*by_rows, "dropped"))
    assert "programs" in found["base_tma"]
    assert found["reduce"] == ["a_P", "a_rows", "a_blocks", "b_P", "b_rows"]


def test_every_form_that_a_launch_asks_for_is_compiled_and_no_other():
    """A mask lies on the first linear of a group, and only a mask has keys of rows."""
    for form in forms((90,), ("bf16",), every=True):
        on = dict(form.switches)
        assert not on.get("PER_ROW") or on.get("DROPOUT", True)
        assert not on.get("DROPOUT") or on.get("FIRST", True)
    base_dx = all_specs()["base_dx"].specimens["base_dx"]
    assert len(base_dx.settings()) == 4 and base_dx.switches in base_dx.settings()
    alone = {form.specimen for form in forms((90,), ("bf16",))}
    assert {name for spec in all_specs().values() for name in spec.specimens} == alone


def test_the_command_compiles_what_it_is_asked_for_and_its_status_says_what_came_of_it(
    monkeypatch, capsys
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked, costs = [], (8, 0)  # bytes of stack

    def compile_all(found, jobs):
        asked.append((found, jobs))
        return [Row(found[0], 100, stack, 10, "wgmma") for stack in costs]

    monkeypatch.setattr(aot, "compile_all", compile_all)
    flags = ["--arch", "90", "--type", "bf16"]
    for more in ((), ("--switches", "--jobs", "3")):
        monkeypatch.setattr(sys, "argv", ["aot", *flags, *more])
        with pytest.raises(SystemExit) as stop:
            aot.main()
        assert stop.value.code == 1 and "!! 8 bytes of stack" in capsys.readouterr().out
    costs = (0, 0)
    with pytest.raises(SystemExit) as stop:
        aot.main()
    assert stop.value.code == 0 and "2 compiled, 0 with a problem" in capsys.readouterr().out
    plain, every = (forms((90,), ("bf16",), every) for every in (False, True))
    assert asked == [(plain, None), (every, 3), (every, 3)] and len(every) > len(plain)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        aot.main()


def test_what_is_wrong_with_a_form_is_named():
    shrink = Form(90, "shrink", "shrink", "bf16", 16, (("DROPOUT", True), ("PER_ROW", False)))
    for row, word in (
        (Row(shrink, 100, 8, 10, "wgmma"), "8 bytes of stack"),
        (Row(shrink, 100, 0, 232_449, "wgmma"), "232449 bytes of shared memory, 232448 exist"),
        (Row(shrink, 100, 0, 10, "none"), "no tensor cores"),
        (Row(shrink, error="does not compile: PassManager::run failed"), "does not compile"),
    ):
        assert any(word in problem for problem in row.problems())
    assert not Row(shrink, 100, 0, 10, "wgmma").problems()
    masked = all_specs()["base_tma"].shipped(2, 32, (9, 0), dropout=True)
    assert (masked.SPECIALISED, masked.BLOCK_N, masked.num_stages) == (0, 128, 3)
