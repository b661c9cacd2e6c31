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
NO_MATMUL = ("reduce", "dequantise_nf4", "pack", "pack_int8")
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# what `rank_block` can give each kernel; the two base matmuls walk over ranks in steps of 32 at
# most
RANK_BLOCKS = {kernel: (16, 32, 64) for kernel in ("shrink", "grads_of_dy", "grad_A")} | {
    kernel: (16, 32) for kernel in ("expand_base", "base_dx", "base_tma", "base_tma_dx")
}
# what a row is called -> kernel, whose configuration it takes, and the switches that differ from
# SWITCHES
VARIANTS = {
    "base_tma_dx": ("base_tma", {"TRANSPOSED": False, "R_TRANSPOSED": False, "BIAS": False}),
    "pack_int8": ("pack", {"INT8": True}),
}
# every switch that costs something is on
SWITCHES = {
    "DROPOUT": True,
    "BIAS": True,
    "FIRST": True,
    "NEED_T": True,
    "TRANSPOSED": True,
    "R_TRANSPOSED": True,
    "DOUBLE": True,
    "PER_ROW": False,
    "PUBLISHED": True,
    "INT8": False,
    "UPCAST": False,
}


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

    def problems(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.arch]} exist")
        if self.dtype == "fp32" and "tf32" in self.mma.split("+"):
            found.append("fp32 became tf32")
        if (
            self.dtype != "fp32"
            and self.kernel not in NO_MATMUL
            and not any(kind in self.mma for kind in MATRIX_UNITS)
        ):
            found.append("no tensor cores")
        if self.kernel == "dequantise_nf4" and "fma" in self.mma.split("+"):
            found.append("fused roundings")
        if self.kernel.startswith("base_tma") and "tma" not in self.mma.split("+"):
            found.append("no TMA")
        return found


def compile_all(archs=ARCHS, types=tuple(TYPES)) -> list[Row]:
    """A row for every arch × kernel × type × rank block that a launch can choose."""
    from rolora_kernels.triton_ops.launch import CONFIGS, configured

    rows = []
    for arch in archs:
        for kernel in (*CONFIGS, *VARIANTS):
            base = VARIANTS.get(kernel, (kernel,))[0]
            for dtype in types:
                width = 4 if kernel in NO_MATMUL else TYPES[dtype]
                if width not in CONFIGS[base] or (base == "base_tma" and arch < 90):
                    continue
                for rank_block in RANK_BLOCKS.get(kernel, (0,)):
                    config = configured(base, width, rank_block, (arch // 10, arch % 10))
                    rows.append(compile_one(arch, kernel, dtype, rank_block, config))
    return rows


def compile_one(arch: int, kernel: str, dtype: str, rank_block: int, config) -> Row:
    """Compiles one kernel (or one of VARIANTS)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    base, differing = VARIANTS.get(kernel, (kernel, {}))
    function = _functions()[base]
    constants = {
        name: value for name, value in config.arguments().items() if not name.startswith("num_")
    }
    constants |= SWITCHES | differing | {"SPECIALISED": bool(config.SPECIALISED)}
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            constexprs[name] = constants[name]
            signature[name] = "constexpr"
            continue
        signature[name] = (
            "*i8" if kernel == "pack_int8" and name == "wire_ptr" else _type(base, name, dtype)
        )
        if name.endswith("_ptr") or name in ("M", "N", "K", "R") or "stride" in name:
            attributes[(place,)] = [["tt.divisibility", 16]]  # as a launch sees at models' sizes
        if name in _UNIT_STRIDES.get(base, ()):
            signature[name], constexprs[name] = "constexpr", 1
            attributes.pop((place,))
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": base != "dequantise_nf4",
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=options,
    )
    ptx = compiled.asm["ptx"]
    registers, stack = resources(compiled.asm["cubin"])
    return Row(
        arch, kernel, dtype, rank_block, registers, stack, compiled.metadata.shared, mma_kind(ptx)
    )


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
    return int(match[1]), int(match[2])


# Strides that are 1 for contiguous operands, which is what models pass: Triton specialises them on
# a launch as well.
_UNIT_STRIDES = {
    "shrink": ("stride_xk", "stride_ak", "stride_sr"),
    "expand_base": ("stride_xk", "stride_wk", "stride_sr", "stride_br", "stride_yn"),
    "base_dx": ("stride_yn", "stride_wk", "stride_tr", "stride_ak", "stride_xk"),
    "grads_of_dy": ("stride_yn", "stride_br", "stride_sr"),
    "grad_A": ("stride_tr", "stride_xk"),
    "reduce": ("a_stride_column", "b_stride_column"),
}
_FP32_POINTERS = {
    "shrink": ("a_ptr",),
    "expand_base": ("b_ptr",),
    "base_dx": ("a_ptr",),
    "grads_of_dy": ("b_ptr", "t_ptr", "db_ptr"),
    "base_tma": ("r_ptr",),
    "grad_A": ("da_ptr",),
    "reduce": ("a_ptr", "b_ptr", "b_out_ptr"),
}


def _type(kernel: str, name: str, dtype: str) -> str:
    """Triton's signature type of a kernel's parameter."""
    if name == "key_ptr":
        return "*i64"
    if kernel == "pack" and name != "wire_ptr":
        return {
            "tensors_ptr": "*i64",
            "published_ptr": "*i64",
            "starts_ptr": "*i64",
            "first_ptr": "*i64",
            "bad_ptr": "*i32",
            "n": "i64",
            "key": "i64",
        }.get(name, "*fp32")
    if kernel == "dequantise_nf4" and name.endswith("_ptr"):
        if name in ("packed_ptr", "absmax_ptr"):
            return "*u8"
        return "*" + dtype if name == "out_ptr" else "*fp32"
    if name.endswith("_ptr"):
        return "*fp32" if name in _FP32_POINTERS.get(kernel, ()) else "*" + dtype
    if name in ("scale", "scaling"):
        return "fp32"
    return "i64" if name == "threshold" else "i32"


def _functions() -> dict:
    """kernel -> the jitted function."""
    from importlib import import_module

    names = {
        "shrink": "shrink_kernel",
        "expand_base": "expand_base_kernel",
        "base_dx": "base_dx_kernel",
        "base_tma": "base_tma_kernel",
        "grads_of_dy": "grads_of_dy_kernel",
        "grad_A": "grad_a_kernel",
        "reduce": "sum_partials_kernel",
        "dequantise_nf4": "dequantise_nf4_kernel",
        "pack": "pack_kernel",
    }
    return {
        file: getattr(import_module(f"rolora_kernels.triton_ops.{file}"), name)
        for file, name in names.items()
    }


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
    print(
        f"{'arch':<7}{'kernel':<15} {'type':<5} {'r':>4} {'regs':>5} {'stack':>6} {'shared':>7}  "
        "mma"
    )
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
