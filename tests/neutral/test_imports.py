"""Which modules an import loads: no framework for the core, no other one for a backend."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import ema
from tests import processes

PACKAGE = Path(ema.__file__).parent
FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "optax", "transformers", "typer", "rich")
NEUTRAL = (
    "ema",
    "ema.checkpoint",
    "ema.command.main",
    "ema.converting",
    "ema.decay",
    "ema.errors",
    "ema.extras",
    "ema.info",
    "ema.plan.model",
    "ema.command.plan",
    "ema.profiles",
    "ema.plan.quantities",
    "ema.schedules",
    "ema.selftest",
    "ema.validate",
    "ema.widths",
)
FORBIDDEN = {
    **dict.fromkeys(NEUTRAL, FRAMEWORKS),
    "ema.torch_backend": ("jax", "jaxlib", "flax", "optax", "transformers", "ema.jax_backend"),
    "ema.jax_backend": ("torch", "transformers", "ema.torch_backend"),
}
PLANTED = [  # the file in which an import is planted, what is imported, and what then must fail
    ("__init__.py", "torch", "ema"),
    ("schedules.py", "jax", "ema"),
    ("errors.py", "flax", "ema.errors"),
    ("info.py", "transformers", "ema.info"),
    ("validate.py", "optax", "ema"),
    ("profiles/combination.py", "torch", "ema.profiles"),
    ("command/main.py", "rich", "ema.command.main"),
    ("plan/model.py", "torch", "ema.plan.model"),
    ("command/plan.py", "typer", "ema.command.plan"),
    ("selftest.py", "torch", "ema.selftest"),
    ("torch_backend/__init__.py", "jax", "ema.torch_backend"),
    ("torch_backend/update/equation.py", "transformers", "ema.torch_backend"),
    ("jax_backend/__init__.py", "torch", "ema.jax_backend"),
    ("jax_backend/update/equation.py", "torch", "ema.jax_backend"),
]


def loaded(module: str, *paths: Path) -> list[str]:
    """Which of the modules forbidden to ``module`` its import loads, in a process of its own."""
    code = (
        f"import sys, {module}\n"
        f"print(*[name for name in {FORBIDDEN[module]!r} if name in sys.modules])\n"
        "print(sys.modules['ema'].__file__)"
    )
    first, *_ = roots = (*paths, PACKAGE.parent)
    path = {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    # `-c` looks into the working folder before it looks into PYTHONPATH
    result = processes.run([sys.executable, "-c", code], path, cwd=first)
    names, file = result.stdout.splitlines()
    assert Path(file).parent.parent == first
    return names.split()


@pytest.mark.parametrize("module", FORBIDDEN)
def test_an_import_loads_no_framework_that_is_not_its_own(module):
    assert loaded(module) == []


@pytest.mark.parametrize(("file", "framework", "module"), PLANTED)
def test_an_import_planted_in_a_copy_of_the_package_is_seen(tmp_path, file, framework, module):
    shutil.copytree(PACKAGE, tmp_path / "ema", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / f"{framework}.py").write_text("")  # enough of it, and quick to import
    with (tmp_path / "ema" / file).open("a") as source:
        source.write(f"\nimport {framework}\n")
    assert framework in loaded(module, tmp_path)


@pytest.mark.parametrize(
    ("backend", "other"), [("torch_backend", "jax_backend"), ("jax_backend", "torch_backend")]
)
def test_neither_backend_names_the_other(backend, other):
    """Also in imports inside functions, which no test of the import alone would see."""
    for file in (PACKAGE / backend).rglob("*.py"):
        text = file.read_text()
        assert f"from ema.{other}" not in text, file
        assert f"import ema.{other}" not in text, file


def test_the_public_names_exist_and_no_others():
    assert len(set(ema.__all__)) == len(ema.__all__)
    assert set(ema.__all__) <= set(dir(ema))
    with pytest.raises(AttributeError, match="module 'ema' has no attribute 'EMAmodel'"):
        _ = ema.EMAmodel
