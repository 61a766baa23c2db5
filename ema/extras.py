"""Optional dependencies: one line that names the extra where one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from ema.errors import MissingExtraError

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra installs it.

    Raises:
        MissingExtraError: ``module`` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # installed, and something that it needs is not: that is another story
        raise MissingExtraError(
            f"`{module}` is not installed: pip install 'ema[{extra}]'"
        ) from error
