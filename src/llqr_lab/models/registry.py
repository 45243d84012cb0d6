"""Every network of the experiments by its name, at the paper's size or small enough for a CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..common.vision import is_packaged
from .packaged import build_packaged, require_packaged
from .pyramidnet import pyramidnet
from .resnet import resnet18, resnet50
from .small_cnn import small_cnn
from .translation import Translator, translation_model
from .vgg import vgg16_bn
from .vit import VisionTransformer, vit
from .wide_resnet import wide_resnet

__all__ = ["MODELS", "SMALL", "build_network", "settings_of"]

# name -> builder(classes, **settings); the defaults of the settings are the paper's network
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "vgg16-bn": vgg16_bn,
    "wrn-28-10": wide_resnet,
    "pyramidnet-110": pyramidnet,
    "resnet50": resnet50,
    "vit-ti16": partial(vit, size="Ti"),
    "vit-s16": partial(vit, size="S"),
    "vit-b16": partial(vit, size="B"),
    "vit-l16": partial(vit, size="L"),
    "transformer-iwslt": translation_model,
    "small-cnn": small_cnn,  # the demo's
}

# the settings of a network of the same kind that a CPU trains in minutes
_SMALL_VIT = dict(width=32, depth=2, heads=2, patch=4, image=32)
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": dict(width=8, blocks=(1, 1, 1)),
    "vgg16-bn": dict(stages=((8, 8), (16, 16), (32,))),
    "wrn-28-10": dict(depth=10, widen=1),
    "pyramidnet-110": dict(depth=8, alpha=24),
    "resnet50": dict(width=8, blocks=(1, 1)),
    "vit-ti16": _SMALL_VIT,
    "vit-s16": _SMALL_VIT,
    "vit-b16": _SMALL_VIT,
    "vit-l16": {**_SMALL_VIT, "depth": 4},
    "transformer-iwslt": dict(width=64, hidden=128, heads=2, layers=2, dropout=0.1),
    "small-cnn": {},
}


def build_network(name: str, classes: int, *, small: bool = False, **settings: Any) -> nn.Module:
    """Build a network.

    Args:
        name: a key of ``MODELS``, or ``timm/NAME`` or ``torchvision/NAME`` of these packages.
        classes: number of classes, or size of the target vocabulary.
        small: start from the settings of ``SMALL`` in place of the paper's; networks of packages
            have one size.
        **settings: what differs from those, as the network's own function takes it.

    Raises:
        ValueError: there is no network of that name.
        ModuleNotFoundError: its package is not installed.

    Example:
        >>> import torch
        >>> model = build_network("resnet18", 10, small=True, channels=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if is_packaged(name):
        return build_packaged(name, classes, **settings)
    if name not in MODELS:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](classes, **{**(SMALL[name] if small else {}), **settings})


def settings_of(name: str) -> set[str]:
    """Return the names of the settings that a network takes.

    Example:
        >>> sorted(settings_of("wrn-28-10"))
        ['channels', 'classes', 'depth', 'widen']
    """
    if is_packaged(name):
        require_packaged(name)
        return {"classes", "channels", "image"}
    builder = MODELS[name]
    # The builders of these hand settings on to a class.
    whole = {"vit": VisionTransformer, "tra": Translator}.get(name[:3])
    named = [*inspect.signature(builder).parameters.values()]
    named += inspect.signature(whole).parameters.values() if whole else []
    fixed = builder.keywords if isinstance(builder, partial) else {}
    return {p.name for p in named if p.kind is not p.VAR_KEYWORD} - set(fixed)
