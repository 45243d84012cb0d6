"""The networks of timm and torchvision by their names there, with random weights."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from ..common.vision import import_vision

__all__ = ["build_packaged", "require_packaged"]

# Their passes in training return several outputs.
SEVERAL_OUTPUTS = {"googlenet", "inception_v3"}


def build_packaged(
    name: str, classes: int, *, channels: int = 3, image: int | None = None, **settings: Any
) -> nn.Module:
    """Build a network of another package.

    Args:
        name: "timm/NAME" or "torchvision/NAME".
        classes: number of classes.
        channels: of the pictures.
        image: their side, for networks of a fixed size; None: the network's usual.
        **settings: what else the package takes for it, such as ``drop_path_rate`` in timm.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it has no such network, or the network does not take the settings.
    """
    require_packaged(name)
    package, _, inner = name.partition("/")
    build = {"timm": _build_timm, "torchvision": _build_torchvision}[package]
    try:
        return build(inner, classes, channels, image, settings)
    except TypeError as error:
        raise ValueError(f"model: {name} does not take these settings: {error}") from error


def require_packaged(name: str) -> None:
    """Raise if the package is missing, or has no such network."""
    package, _, inner = name.partition("/")
    known = _known_names(package)
    if inner not in known:
        near = [f"{package}/{n}" for n in difflib.get_close_matches(inner, known, n=3, cutoff=0.5)]
        meant = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)} others"
        raise ValueError(f"model: {package} has no network {inner!r} for this; {meant}")


def _known_names(package: str) -> list[str]:
    if package == "timm":
        return list(import_vision("timm").list_models())
    models = import_vision("torchvision.models")
    # Those of the module itself classify; others detect and segment.
    return [n for n in models.list_models(module=models) if n not in SEVERAL_OUTPUTS]


def _build_timm(
    name: str, classes: int, channels: int, image: int | None, settings: dict[str, Any]
) -> nn.Module:
    timm = import_vision("timm")
    about = timm.get_pretrained_cfg(name)
    if image is not None and about is not None and about.fixed_input_size:
        settings = {"img_size": image, **settings}
    made: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=classes, in_chans=channels, **settings
    )
    return made


def _build_torchvision(
    name: str, classes: int, channels: int, image: int | None, settings: dict[str, Any]
) -> nn.Module:
    if channels != 3:
        raise ValueError(
            f"model: torchvision's networks take pictures of 3 channels, these have {channels}; "
            "timm's take any number (model=timm/NAME)"
        )
    if image is not None and name.startswith("vit_"):
        settings = {"image_size": image, **settings}
    if image is not None and name.startswith("maxvit"):
        settings = {"input_size": (image, image), **settings}
    made: nn.Module = import_vision("torchvision.models").get_model(
        name, weights=None, num_classes=classes, **settings
    )
    return made
