"""The house: small rooms, small files, and names that say where they come from."""

import ast
from pathlib import Path

import pytest
from radon.complexity import cc_visit

import ema

ROOT = Path(ema.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MOST_MODULES = 16
MOST_LINES = 400
MOST_COMPLEX = 15
LONGER = {"torch_backend/model.py"}
"""The class that users read most: its excess is documentation."""


def short(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "room", sorted({path.parent for path in FILES}), ids=lambda room: short(room) or "ema"
)
def test_a_room_has_at_most_sixteen_modules(room):
    modules = [path for path in room.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES


@pytest.mark.parametrize("backend", ["torch_backend", "jax_backend"])
def test_a_backend_has_at_most_sixteen_entries_with_its_rooms(backend):
    entries = [
        path
        for path in (ROOT / backend).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert len(entries) <= MOST_MODULES


def test_no_file_is_longer_than_four_hundred_lines():
    lengths = {short(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name for name, length in lengths.items() if length > MOST_LINES} <= LONGER


def code_lines(path):
    """Lines that hold neither a docstring nor a comment nor nothing."""
    text = path.read_text()
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), start=1)
    return [n for n, line in lines if n not in documentation and line.strip().strip("#")]


@pytest.mark.parametrize("name", sorted(LONGER))
def test_the_excess_of_the_longer_files_is_documentation(name):
    assert len(code_lines(ROOT / name)) <= 1.5 * MOST_LINES


@pytest.mark.parametrize("folder", ["ema", "benchmarks"])
def test_no_function_is_more_complex_than_fifteen(folder):
    """By the count of ``radon cc``: branches, loops, conditions and comprehensions."""
    found = {
        f"{path.relative_to(ROOT.parent)}: {block.name}": block.complexity
        for path in (ROOT.parent / folder).rglob("*.py")
        for block in cc_visit(path.read_text())
    }
    assert len(found) > 80
    assert {name: count for name, count in found.items() if count > MOST_COMPLEX} == {}


def exported(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
    return set()


def module_file(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported_names():
    """Each name that one module of ema takes from another: where, from which, and the name."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ema."):
                for alias in node.names:
                    yield short(path), node.module, alias.name


def test_every_name_that_another_module_imports_is_exported():
    missing = [
        f"{path}: {module}.{name}"
        for path, module, name in imported_names()
        if module_file(module).exists()
        and name not in exported(module_file(module))
        and not module_file(f"{module}.{name}").exists()
    ]
    assert missing == []
