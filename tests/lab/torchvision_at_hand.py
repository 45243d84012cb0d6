"""torchvision and timm for the tests that need them: skipped, with the reason, if they are not."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

_kept = []  # the definitions hold as long as the library lives


def require_vision(*packages: str) -> None:
    """Import the packages, or skip the test.

    torchvision's operators are compiled for one torch. Beside another (a CUDA build beside the
    CPU's torch) they do not load, and the import ends at the first operators that it looks up;
    with their definitions, all that is written in Python works.
    """
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install 'llqr[vision]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_module("torchvision")
        except RuntimeError:
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou) -> Tensor")
            _kept.append(library)
            import_module("torchvision")
        for package in packages:
            import_module(package)
