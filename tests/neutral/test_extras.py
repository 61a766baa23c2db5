"""Optional dependencies."""

from __future__ import annotations

import math
import sys

import pytest

import ema
from ema.extras import require


def test_an_installed_module_is_returned():
    assert require("math", "torch") is math
    assert require("os.path", "torch") is sys.modules["os.path"]


@pytest.mark.parametrize("module", ["not_installed_anywhere", "not_installed_anywhere.part"])
def test_a_missing_module_is_one_line_that_names_the_extra(module):
    with pytest.raises(
        ema.MissingExtraError,
        match=rf"^`{module}` is not installed: pip install 'ema\[transformers\]'$",
    ) as caught:
        require(module, "transformers")
    assert isinstance(caught.value, ImportError)


def test_a_module_whose_own_dependency_is_missing_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere") as caught:
        require("half_installed", "torch")
    assert not isinstance(caught.value, ema.MissingExtraError)
