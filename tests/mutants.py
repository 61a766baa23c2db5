"""Mutation testing of the mathematics: ``make mutants``.

Each mutant is the source of one module with one number, operator, comparison or function changed. The tests
of that module run on it, in a forked process that has the frameworks loaded already; a mutant that they
let pass survives. Survivors are printed, and the exit code is 1, unless :data:`EQUIVALENT` says why no test
can tell them from the original. It takes about seven minutes on two cores, and is not part of CI.
"""

from __future__ import annotations

import ast
import copy
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 300
"""Seconds for the tests of one mutant; one that hangs is a mutant that was noticed."""

TESTS = {
    "ema/decay.py": ["tests/neutral/test_decay.py", "tests/neutral/test_validate.py"],
    "ema/schedules.py": ["tests/neutral/test_schedules.py", "tests/neutral/test_validate.py"],
    "ema/torch_backend/update/equation.py": [
        "tests/torch_backend/test_equation.py",
        "tests/torch_backend/test_precision.py",
        "tests/torch_backend/test_update.py",
        "tests/conformance/test_bits.py",
    ],
    "ema/jax_backend/update/equation.py": [
        "tests/jax_backend/test_equation.py",
        "tests/jax_backend/test_update.py",
        "tests/conformance/test_bits.py",
    ],
}
"""For each module the tests that cover it, the fastest first."""

EQUIVALENT = {
    "return xp.minimum(1.0, (1.0 - self.decay) + self.decay * xp.exp(-(count / self.tau))):"
    " 1.0 -> 2.0": "the sum rounds to at most 1; the bound says so",
    "return xp.minimum(1.0, xp.maximum(0.0, weight)): 1.0 -> 2.0": "likewise",
    "later = xp.maximum(count, 2.0)  # log1p(−1) is −∞, which jax_debug_infs reports: 2.0 -> 0.0": "the same weight, by way of −∞",
}
"""Mutants, as they are printed behind their line, that change no number, each with its reason."""
TABLE = "EXAMPLES"
"""Examples are not mathematics, and are left as they are."""

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
NAMES = {
    "minimum": "maximum",
    "maximum": "minimum",
    "expm1": "exp",
    "exp": "expm1",
    "add": "sub",
    "sub": "add",
    "sub_": "add_",
    "add_": "sub_",
    "positive": "real",
    "fraction": "real",
}


def mutations(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in place of this one."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        if node.value != 0:
            yield ast.Constant(0 * node.value)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Each mutant of a module: what was changed, and its source."""
    tree, lines = ast.parse(source), source.splitlines()
    left = {
        id(node)
        for table in tree.body
        if isinstance(table, ast.AnnAssign) and ast.unparse(table.target) == TABLE
        for node in ast.walk(table)
    }
    for index, node in enumerate(ast.walk(tree)):
        for other in mutations(node) if id(node) not in left else ():
            changed = copy.deepcopy(tree)
            target = list(ast.walk(changed))[index]
            new = ast.fix_missing_locations(ast.copy_location(copy.deepcopy(other), target))
            replaced = _Replace(target, new).visit(changed)
            text = lines[getattr(node, "lineno", 1) - 1].strip()
            yield f"{text}: {ast.unparse(node)} -> {ast.unparse(other)}", ast.unparse(replaced)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self._target, self._new = target, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self._new if node is self._target else super().generic_visit(node)


def run_tests(folder: Path, tests: list[str]) -> None:
    """In a process of its own: leave with the exit code of pytest."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    os._exit(int(pytest.main([*options, "-m", "not slow", *tests])))


def survives(name: str, source: str, tests: list[str]) -> bool:
    """Whether the tests pass on a copy of the package with this source."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for each in ("ema", "tests"):
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / each, folder / each, ignore=ignored)
        for each in ("pyproject.toml", "README.md", "docs"):
            (folder / each).symlink_to(ROOT / each)
        (folder / name).write_text(source)
        process = multiprocessing.get_context("fork").Process(
            target=run_tests, args=(folder, tests)
        )
        process.start()
        process.join(LIMIT)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return process.exitcode == 0


def main(chosen: list[str]) -> int:
    """Test every mutant of the modules whose names hold one of the words; of all without words."""
    import jax
    import torch

    del jax
    torch.set_num_threads(1)
    surviving = 0
    for name, tests in TESTS.items():
        if chosen and not any(word in name for word in chosen):
            continue
        source = (ROOT / name).read_text()
        if not survives(name, source, tests):
            print(f"{name}: the tests fail on the module as it is")
            return 2
        several = list(mutants(source))
        with ThreadPoolExecutor(2) as pool:
            alive = list(
                pool.map(lambda mutant, n=name, t=tests: survives(n, mutant[1], t), several)
            )
        left = [what for (what, _), lives in zip(several, alive, strict=True) if lives]
        known = [what for what in left if what in EQUIVALENT]
        print(
            f"{name}: {len(several)} mutants, {len(left)} survive, {len(known)} of them equivalent"
        )
        for what in left:
            if what not in known:
                print(f"    {what}")
        surviving += len(left) - len(known)
    return int(surviving > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
