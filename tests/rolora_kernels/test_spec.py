"""Every kernel file says in its SPEC all that launching, compiling ahead of time and tuning ask."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rolora_kernels import triton_ops
from rolora_kernels.plan import IMPLEMENTATIONS, RULE
from rolora_kernels.triton_ops.spec import NO_KERNEL, all_specs

FOLDER = Path(triton_ops.__file__).parent
SPECS = all_specs()


def kernels(path: Path) -> list[ast.FunctionDef]:
    """The kernels that a file defines: jitted functions whose names end in `_kernel`."""
    return [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.decorator_list
        and node.name.endswith("_kernel")
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_file_has_a_kernel_and_its_spec_or_neither(path):
    found = kernels(path)
    assert bool(found) == (path.stem in SPECS) == (path.stem not in NO_KERNEL)
    for node in found:
        assert SPECS[path.stem].kernel.__name__ == node.name


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_sets_every_parameter_that_is_fixed_when_compiling(name):
    spec = SPECS[name]
    (node,) = kernels(FOLDER / f"{name}.py")
    fixed = {
        arg.arg
        for arg in node.args.args
        if arg.annotation and ast.unparse(arg.annotation) == "tl.constexpr"
    }
    runtime = {arg.arg for arg in node.args.args} - fixed
    for specimen in spec.specimens.values():
        for width in spec.configs:
            config = spec.shipped(width, spec.rank_blocks[0] if spec.rank_blocks else 0)
            blocks = {key for key in spec.arguments(config) if not key.startswith("num_")}
            assert fixed - {"UPCAST", "SPECIALISED"} == blocks | set(specimen.switches)
        assert {*specimen.types, *specimen.unit_strides} <= runtime


def test_the_specs_are_what_the_plans_can_name():
    by = {name: {"torch"} for name in IMPLEMENTATIONS}
    for spec in SPECS.values():
        for primitive in spec.primitives:
            by[primitive].add(spec.implementation)
    assert by == {name: set(kinds) for name, kinds in IMPLEMENTATIONS.items()}
    for name in RULE:
        assert SPECS[name].sizes and SPECS[name].grid and SPECS[name].call and SPECS[name].traffic


def test_ranks_are_padded_to_blocks_that_a_kernel_has():
    blocks = {
        name: [spec.rank_block(r) for r in (1, 16, 17, 64, 256)] for name, spec in SPECS.items()
    }
    for name in ("shrink", "grads_of_dy", "grad_A"):
        assert blocks[name] == [16, 16, 32, 64, 64]
    for name in ("expand_base", "base_dx", "base_tma"):
        assert blocks[name] == [16, 16, 32, 32, 32]
    assert blocks["reduce"] == [0] * 5


def test_a_matmuls_blocks_reach_base_dx_by_its_own_names():
    spec = SPECS["base_dx"]
    given = spec.arguments(spec.shipped(2, 16))
    assert (given["TILE_K"], given["STEP_N"]) == (128, 64) and "BLOCK_N" not in given
