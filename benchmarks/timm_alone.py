"""The real ``timm.utils`` on a machine without torchvision.

timm requires torchvision, whose wheels require a torch of their own, so the Makefile installs timm
without what it requires. ``timm/__init__.py``, which loads the models and their transforms, is not
run then, and the one class of torchvision that ``timm.utils`` asks for is an empty one: it serves to
recognize layers that no model here has.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

from torch import nn

__all__ = ["timm_utils"]

MODULES = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


@functools.cache
def timm_utils() -> ModuleType:
    """The module, with ``ModelEmaV3`` and ``CheckpointSaver`` among others.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    spec = find_spec("timm")
    if spec is None:
        raise ModuleNotFoundError("timm is missing: `pip install --no-deps timm`, as the Makefile")
    if find_spec("torchvision") is not None:
        return import_module("timm.utils")
    sys.modules.setdefault("timm", module_from_spec(spec))
    stubs = {name: ModuleType(name) for name in MODULES}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(stubs)
    try:
        return import_module("timm.utils")
    finally:  # others ask whether torchvision is there, and would believe these
        for name in MODULES:
            del sys.modules[name]
