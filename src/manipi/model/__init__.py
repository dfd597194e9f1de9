"""The policies as tensors in, tensors out: knows no robot, file or dataset.

Importing `manipi.model.config` does not import torch; `VLA` and `ModelInput` do, at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manipi.model.inputs import ModelInput
    from manipi.model.vla import VLA

__all__ = ["VLA", "ModelInput"]


def __getattr__(name: str) -> Any:
    modules = {"VLA": "vla", "ModelInput": "inputs"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)
