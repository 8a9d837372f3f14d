"""Imports point down the house only; see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "lq": {"engine", "models", "quantize", "rag", "prompts", "server"},
    "server": {"engine", "models", "prompts", "rag"},
    "quantize": {"engine", "models"},
    "engine": set(),
    "models": set(),
    "rag": set(),
    "prompts": set(),
}


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            roots.add(node.module.partition(".")[0])
    return roots


@pytest.mark.parametrize("floor", sorted(ALLOWED))
def test_imports_point_down_only(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"{floor}/ holds no Python file"
    for path in files:
        forbidden = imported_roots(path) & (ALLOWED.keys() - ALLOWED[floor] - {floor})
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_one_file_a_floor_touches_llama_cpp():
    users = {
        path.relative_to(ROOT).as_posix()
        for floor in ALLOWED
        for path in (ROOT / floor).rglob("*.py")
        if "llama_cpp" in imported_roots(path)
    }
    assert users <= {"engine/llama.py", "quantize/gguf_files/types.py"}


# As architecture.md says.
PURE = [
    "sequence",
    "prefix",
    "cells",
    "worth",
    "stash",
    "holdings",
    "fairness",
    "scheduler",
    "leaders",
    "rotation",
    "turns",
    "pace",
    "luck",
    "bounds",
    "lookup",
]


@pytest.mark.parametrize("name", PURE)
def test_what_decides_in_the_engine_knows_no_clock_no_files_and_no_native_code(name):
    tree = ast.parse((ROOT / "engine" / f"{name}.py").read_text("utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {module.removeprefix("engine.") for module in found if module and module.startswith("engine")}
    assert ours <= {*PURE, "request"}
    assert not found & {"time", "os", "pathlib", "ctypes", "numpy", "llama_cpp"}
