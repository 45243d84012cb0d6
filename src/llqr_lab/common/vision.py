"""timm and torchvision, which are not needed: their names, and importing them if they are there."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["PACKAGES", "import_vision", "is_packaged"]

PACKAGES = ("timm", "torchvision")


def is_packaged(name: str) -> bool:
    """Tell whether the name of a network is one of timm's or torchvision's, as ``timm/resnet18``.

    Example:
        >>> is_packaged("timm/resnet18"), is_packaged("resnet18")
        (True, False)
    """
    package, slash, _ = name.partition("/")
    return bool(slash) and package in PACKAGES


def import_vision(module: str) -> Any:
    """Return a module of timm or torchvision.

    Raises:
        ModuleNotFoundError: the package is not installed; the text has the command.
        ValueError: it was built for another torch.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        if missing not in PACKAGES:
            raise
        # timm needs torchvision.
        raise ModuleNotFoundError(
            f"{missing} is not installed; pip install 'llqr[vision]'", name=missing
        ) from error
    except RuntimeError as error:  # its operators do not load
        import torch

        raise ValueError(
            f"torchvision: the installed one does not fit torch {torch.__version__} ({error}); "
            "pip install --upgrade torch torchvision, both from one index"
        ) from error
