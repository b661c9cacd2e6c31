"""The house as drawn: imports point one way, lazy and typing ones included; files, functions, lines
and the front page are short, and ternaries few.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rolora", "rolora_kernels")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file names in any import statement, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES} - {name_of(path)}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            found = visit(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    for start in sorted(graph):
        found = visit(start, [])
        if found:
            return found
    return []


def test_a_planted_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_circle_of_imports():
    assert circle(GRAPH) == []


def test_kernels_import_nothing_of_rolora():
    for name, found in GRAPH.items():
        if name.startswith("rolora_kernels"):
            assert not {other for other in found if other.split(".")[0] == "rolora"}, name


# Each folder may import from itself and from those before it.
LEVELS = [
    {"rolora.errors", "rolora.atomic", "rolora.builtin", "rolora_kernels"},
    {"rolora.config"},
    {"rolora.adapter"},
    {"rolora.hf"},
    {"rolora.data"},
    {"rolora.recipes"},
    {"rolora.federated"},
    {"rolora.cohort"},
    {"rolora.transport"},
    {"rolora.run"},
    {"rolora.exporting", "rolora.reporting"},
]


def level(name: str) -> int:
    if name.startswith("rolora.transport.flower_app"):
        return len(LEVELS)  # what Flower starts
    for number, folders in enumerate(LEVELS):
        if any(name == folder or name.startswith(folder + ".") for folder in folders):
            return number
    return len(LEVELS)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_import_points_upward(name):
    upward = {other for other in GRAPH[name] if level(other) > level(name)}
    assert not upward, f"{name} imports {sorted(upward)}"


EVERYWHERE = sorted(
    path
    for folder in (*PACKAGES, "tests", "benchmarks", "examples", "docs")
    for path in (ROOT / folder).rglob("*.py")
)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in EVERYWHERE}
# What is longer for a reason: a loop in which a method of comparison stands beside the next.
LONGER = {"benchmarks.bad_clients.ours", "benchmarks.place.figures"}


def is_kernel(node: ast.FunctionDef) -> bool:
    """Whether Triton compiles it: operands, sizes and strides are arguments, the body is one."""
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


def functions(path: Path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            yield node


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How many loops, conditions, contexts and attempts stand within each other."""
    depth += isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try)
    inner = [nesting(child, depth) for child in ast.iter_child_nodes(node)]
    return max([depth, *inner])


@pytest.mark.parametrize("path", EVERYWHERE, ids=name_of)
def test_files_functions_and_lines_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    if path.relative_to(ROOT).parts[0] != "tests":  # which hold data and programs in texts
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        assert not long, f"lines {long}"
    for node in functions(path):
        name = f"{name_of(path)}.{node.name}"
        assert (node.end_lineno or 0) - node.lineno + 1 <= 72 or name in LONGER, name
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        assert len(taken) <= 12, name
        assert max(nesting(part) for part in node.body) <= 6, name


@pytest.mark.parametrize("path", EVERYWHERE, ids=name_of)
def test_no_ternary_stands_inside_another(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            assert not inner, f"line {node.lineno}"


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
def test_ternaries_are_few(folder):
    """At most 2.5 in a hundred lines of code."""
    found = code = 0
    for path in EVERYWHERE:
        if path.relative_to(ROOT).parts[0] == folder:
            found += sum(isinstance(node, ast.IfExp) for node in ast.walk(TREES[path]))
            lines = path.read_text(encoding="utf-8").splitlines()
            code += sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
    assert 100 * found <= 2.5 * code, f"{100 * found / code:.2f}"


def test_the_front_page_is_at_most_150_lines_and_1200_words():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


def test_the_measures_measure():
    """Each finds what it is for in a planted text."""
    (node,) = ast.parse("def f(a):\n for i in a:\n  if i:\n   with i: pass").body
    assert nesting(node) == 3
    (kernel,) = ast.parse("@triton.jit\ndef k(a): pass").body
    assert is_kernel(kernel) and not is_kernel(node)
