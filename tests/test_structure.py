"""The house as drawn: imports point one way, lazy and typing ones included; lines are short and ternaries are not nested."""

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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lines_of_at_most_100_columns_and_no_ternary_inside_a_ternary(path):
    text = path.read_text(encoding="utf-8")
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert not long, f"lines {long}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            assert not inner, f"line {node.lineno}"
