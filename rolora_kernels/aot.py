"""`python -m rolora_kernels.aot`: compiles every shipped configuration for every architecture,
without a GPU.

A row each: arch, kernel, element type, rank block, registers, stack bytes, shared bytes, kind of
matrix instruction. Ends with 1 and names the rows when one has a stack frame, more shared memory
than its architecture has, fp32 that became TF32, or a 16-bit matmul without tensor cores. Takes the
resource usage from the `cuobjdump` that Triton's package carries.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rolora_kernels.triton_ops.spec import Config, Spec, Specimen, all_specs

ARCHS = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}  # bytes a block may opt in to
MATRIX_UNITS = {"wgmma": r"wgmma\.mma", "tcgen05": r"tcgen05\.mma", "mma.sync": r"mma\.sync"}
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Row:
    """What one compiled kernel costs, and what is wrong with it."""

    arch: int
    kernel: str
    dtype: str
    rank_block: int
    registers: int
    stack: int
    shared: int
    mma: str
    spec: Spec

    def problems(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} exist")
        if self.dtype == "fp32" and "tf32" in self.mma.split("+"):
            found.append("fp32 became tf32")
        if self.spec.matmul and self.dtype != "fp32" and not self.uses_tensor_cores():
            found.append("no tensor cores")
        if self.spec.options.get("enable_fp_fusion") is False and "fma" in self.mma.split("+"):
            found.append("fused roundings")
        if self.spec.implementation == "tma" and "tma" not in self.mma.split("+"):
            found.append("no TMA")
        return found

    def uses_tensor_cores(self) -> bool:
        return any(unit in self.mma for unit in MATRIX_UNITS)


def compile_all(archs=ARCHS, types=tuple(TYPES)) -> list[Row]:
    """A row for every arch × kernel × type × rank block that a launch can choose."""
    rows = []
    for arch in archs:
        for spec in all_specs().values():
            if arch >= spec.first_arch:
                rows += compile_kernel(arch, spec, types)
    return rows


def compile_kernel(arch: int, spec: Spec, types) -> list[Row]:
    """The rows of one kernel on one architecture."""
    rows = []
    for name in spec.specimens:
        for dtype in types:
            width = TYPES[dtype] if spec.matmul else 4  # what is no matmul works on fp32
            if width not in spec.configs:
                continue
            for rank_block in spec.rank_blocks or (0,):
                config = spec.shipped(width, rank_block, (arch // 10, arch % 10))
                rows.append(compile_one(arch, spec, name, dtype, rank_block, config))
    return rows


def compile_one(
    arch: int, spec: Spec, name: str, dtype: str, rank_block: int, config: Config
) -> Row:
    """Compiles one specimen of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    specimen = spec.specimens[name]
    constants = {
        **spec.arguments(config),
        **specimen.switches,
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
            signature[given] = _type(given, dtype, specimen)
            if _divisible(given):
                attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **spec.options}
    compiled = triton.compile(
        ASTSource(spec.kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    mma = mma_kind(compiled.asm["ptx"])
    registers, stack = resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Row(arch, name, dtype, rank_block, registers, stack, shared, mma, spec)


def _divisible(parameter: str) -> bool:
    """Whether a launch at models' sizes sees a multiple of 16 here, and specialises on it."""
    is_size = parameter in ("M", "N", "K", "R")
    return is_size or parameter.endswith("_ptr") or "stride" in parameter


def _type(parameter: str, dtype: str, specimen: Specimen) -> str:
    """Triton's signature type of a kernel's parameter: what the specimen says, else a rule."""
    if parameter in specimen.types:
        return specimen.types[parameter]
    if parameter == "key_ptr":
        return "*i64"
    if parameter.endswith("_ptr"):
        return "*" + dtype
    return {"scale": "fp32", "scaling": "fp32", "threshold": "i64"}.get(parameter, "i32")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, choices=ARCHS, action="append", help="only these (default: all)"
    )
    parser.add_argument(
        "--type", choices=tuple(TYPES), action="append", help="only these (default: all)"
    )
    args = parser.parse_args()
    rows = compile_all(args.arch or ARCHS, args.type or tuple(TYPES))
    header = ("arch", "kernel", "type", "r", "regs", "stack", "shared", "mma")
    print("{:<7}{:<15} {:<5} {:>4} {:>5} {:>6} {:>7}  {}".format(*header))
    for row in rows:
        print(
            f"sm_{row.arch:<4}{row.kernel:<15} {row.dtype:<5} {row.rank_block:>4} "
            f"{row.registers:>5} {row.stack:>6} {row.shared:>7}  "
            f"{row.mma}" + "".join(f"  !! {problem}" for problem in row.problems())
        )
    bad = [row for row in rows if row.problems()]
    print(f"{len(rows)} compiled, {len(bad)} with a problem")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
