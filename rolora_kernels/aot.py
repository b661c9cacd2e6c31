"""`python -m rolora_kernels.aot`: compiles every shipped configuration for every architecture,
without a GPU; with `--switches` in every form that a launch can ask for, dropout on and off.

A row each: arch, kernel, element type, rank block, registers, stack bytes, shared bytes, blocks
that a multiprocessor holds at a time, kind of matrix instruction. Ends with 1 and names the rows
when one has a stack frame, more shared memory than its architecture has, fp32 that became TF32, or
a 16-bit matmul without tensor cores. Takes the resource usage from the `cuobjdump` that Triton's
package carries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rolora_kernels.occupancy import LIMITS, blocks
from rolora_kernels.triton_ops.spec import Config, Spec, Specimen, all_specs

ARCHS = tuple(LIMITS)
MATRIX_UNITS = {"wgmma": r"wgmma\.mma", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Form:
    """One form of a kernel: `file` names its SPEC, `specimen` one of the SPEC's."""

    arch: int
    file: str
    specimen: str
    dtype: str
    rank_block: int
    switches: tuple[tuple[str, int], ...]

    @property
    def spec(self) -> Spec:
        return all_specs()[self.file]

    @property
    def config(self) -> Config:
        capability = self.arch // 10, self.arch % 10
        dropout = bool(dict(self.switches).get("DROPOUT"))
        return self.spec.shipped(TYPES[self.dtype], self.rank_block, capability, dropout)

    def on(self) -> str:
        """The switches that are on."""
        return "+".join(name.lower() for name, value in self.switches if value is True) or "-"


@dataclass(frozen=True)
class Row:
    """What one compiled form costs, and what is wrong with it."""

    form: Form
    registers: int = 0
    stack: int = 0
    shared: int = 0
    mma: str = "none"
    error: str = ""
    blocks: int = 0

    def problems(self) -> list[str]:
        if self.error:
            return [self.error]
        return self._costs() + self._instructions()

    def _costs(self) -> list[str]:
        found, limit = [], LIMITS[self.form.arch].shared_of_a_block
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} exist")
        return found

    def _instructions(self) -> list[str]:
        found, spec, kinds = [], self.form.spec, self.mma.split("+")
        if self.form.dtype == "fp32" and "tf32" in kinds:
            found.append("fp32 became tf32")
        if spec.matmul and self.form.dtype != "fp32" and not self.uses_tensor_cores():
            found.append("no tensor cores")
        if spec.options.get("enable_fp_fusion") is False and "fma" in kinds:
            found.append("fused roundings")
        if spec.implementation == "tma" and "tma" not in kinds:
            found.append("no TMA")
        return found

    def uses_tensor_cores(self) -> bool:
        return any(unit in self.mma for unit in MATRIX_UNITS)


def forms(archs=ARCHS, types=tuple(TYPES), every: bool = False) -> list[Form]:
    """Every arch × specimen × type × rank block that a launch can choose; with `every`, also every
    setting of the switches that launches turn on and off.
    """
    found = []
    for arch in archs:
        for file, spec in all_specs().items():
            if arch >= spec.first_arch:
                found += _forms_of(arch, file, spec, types, every)
    return found


def _forms_of(arch: int, file: str, spec: Spec, types, every: bool) -> list[Form]:
    """The forms of one kernel on one architecture."""
    found = []
    for name, specimen in spec.specimens.items():
        settings = specimen.settings() if every else [specimen.switches]
        # what is no matmul works on fp32
        chosen = [dtype for dtype in types if TYPES[dtype] in spec.configs and spec.matmul]
        for dtype in chosen if spec.matmul else ["fp32"]:
            for rank_block in spec.rank_blocks or (0,):
                for switches in settings:
                    given = tuple(switches.items())
                    found.append(Form(arch, file, name, dtype, rank_block, given))
    return found


def compile_all(found: list[Form], jobs: int | None = None) -> list[Row]:
    """A row for every form, compiled in several processes."""
    # not forked: a fork of a process with threads may hang
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=start) as pool:
        return list(pool.map(compile_one, found, chunksize=4))


def compile_one(form: Form) -> Row:
    """Compiles one form; an error of the compiler's is the row's problem."""
    import triton
    from triton.backends.compiler import GPUTarget

    config = form.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **form.spec.options}
    try:
        compiled = triton.compile(
            source(form), target=GPUTarget("cuda", form.arch, 32), options=options
        )
    except Exception as error:
        return Row(form, error=f"does not compile: {str(error).splitlines()[-1][:80]}")
    registers, stack = resources(compiled.asm["cubin"])
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    threads = int(re.findall(r"\.reqntid (\d+)", ptx)[0])  # warps that only load included
    columns = getattr(compiled.metadata, "tmem_size", 0)
    held = blocks(form.arch, threads, registers, shared, columns)
    return Row(form, registers, stack, shared, mma_kind(ptx), blocks=held)


def source(form: Form):
    """What Triton compiles for a form: the kernel with its types, constants and divisibilities."""
    from triton.compiler import ASTSource

    spec, config = form.spec, form.config
    specimen = spec.specimens[form.specimen]
    constants: Mapping[str, object] = {
        **spec.arguments(config),
        **dict(form.switches),
        "SPECIALISED": bool(config.SPECIALISED),
        "UPCAST": False,
    }
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(spec.kernel.params):
        given = parameter.name
        if parameter.is_constexpr:
            signature[given], constexprs[given] = "constexpr", constants[given]
        elif given in specimen.unit_strides:
            signature[given], constexprs[given] = "constexpr", 1
        else:
            signature[given] = _type(given, form.dtype, specimen)
            if _divisible(given) and not spec.kernel.params[place].do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(spec.kernel, signature, constexprs, attributes)


def _divisible(parameter: str) -> bool:
    """Whether a launch at models' sizes sees a multiple of 16 here, and specialises on it."""
    is_size = parameter in ("M", "N", "K", "R", "part")
    return is_size or parameter.endswith("_ptr") or "stride" in parameter


def _type(parameter: str, dtype: str, specimen: Specimen) -> str:
    """Triton's signature type of a kernel's parameter: what the specimen says, else a rule."""
    if parameter in specimen.types:
        return specimen.types[parameter]
    if parameter == "key_ptr":
        return "*i64"
    if parameter.endswith("_ptr"):
        return "*" + dtype
    return {"scale": "fp32", "scaling": "fp32"}.get(parameter, "i32")


def mma_kind(ptx: str) -> str:
    """What a kernel's PTX multiplies with: wgmma, tcgen05 or mma.sync; "none" without any.

    Added where they occur: tf32, tma, specialised (warp groups), fma (fp32, fused).
    """
    kinds = [name for name, pattern in MATRIX_UNITS.items() if re.search(pattern, ptx)]
    seen = {
        "tf32": "tf32",
        "tma": "cp.async.bulk.tensor",
        "specialised": "setmaxnreg",
        "fma": "fma.rn.f32",
    }
    return "+".join([*kinds, *(name for name, word in seen.items() if word in ptx)]) or "none"


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread) of the kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise ValueError(f"the disassembler names no registers: {text[:200]!r}")
    return int(match[1]), int(match[2])


def report(rows: list[Row]) -> int:
    """Prints a line a row; 1 where one has a problem, else 0."""
    header = ("arch", "kernel", "type", "r", "regs", "stack", "shared", "blocks", "mma", "on")
    print("{:<7}{:<22} {:<5} {:>4} {:>5} {:>6} {:>7} {:>6}  {:<23} {}".format(*header))
    for row in rows:
        form = row.form
        print(
            f"sm_{form.arch:<4}{form.specimen:<22} {form.dtype:<5} {form.rank_block:>4} "
            f"{row.registers:>5} {row.stack:>6} {row.shared:>7} {row.blocks:>6}  {row.mma:<23} "
            f"{form.on()}" + "".join(f"  !! {problem}" for problem in row.problems())
        )
    bad = [row for row in rows if row.problems()]
    print(f"{len(rows)} compiled, {len(bad)} with a problem")
    return 1 if bad else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, choices=ARCHS, action="append", help="only these (default: all)"
    )
    parser.add_argument(
        "--type", choices=tuple(TYPES), action="append", help="only these (default: all)"
    )
    parser.add_argument(
        "--switches",
        action="store_true",
        help="every switch on and off: dropout, bias, a group's later linears, transposed weights",
    )
    parser.add_argument("--jobs", type=int, help="processes (default: as many as there are CPUs)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("aot: TRITON_INTERPRET=1 makes kernels that cannot be compiled: unset it")
    asked = forms(args.arch or ARCHS, args.type or tuple(TYPES), args.switches)
    sys.exit(report(compile_all(asked, args.jobs)))


if __name__ == "__main__":
    main()
