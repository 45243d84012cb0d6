"""Decoding pictures with pillow: whole, cropped at random, or cropped in the middle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from .errors import explain_errors

__all__ = ["Box", "central_box", "decode_image", "random_box"]

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def random_box(width: int, height: int, generator: Generator) -> Box:
    """Draw the part of a picture that is shown, as ImageNet training does (Szegedy et al., 2015).

    Area uniform in 8 to 100 %, the logarithm of width / height uniform in log 3/4 .. log 4/3; the
    place uniform. Ten draws that do not fit give the largest box in the middle with a ratio in that
    range.
    """
    for _ in range(10):
        u = torch.rand(4, generator=generator).tolist()
        area = width * height * (0.08 + 0.92 * u[0])
        ratio = math.exp((2 * u[1] - 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = u[2] * (width - w), u[3] * (height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def central_box(width: int, height: int, share: float = 224 / 256) -> Box:
    """Return the square in the middle, ``share`` of the shorter side long.

    Resized to 224 pixels it is what "shorter side to 256, then the central 224" shows.
    """
    side = share * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def decode_image(
    path: Path, how: str, side: int | None = None, generator: Generator | None = None
) -> Tensor:
    """Return a picture as uint8 (3, height, width); grey ones get three equal channels.

    Args:
        path: of the file, in any format that pillow knows.
        how: a sentence that says how to get the data, for the error.
        side: resize the chosen part to (side, side); None leaves the picture whole.
        generator: draws the part; None takes the middle.

    Raises:
        DataError: the file is damaged.
    """
    with explain_errors(path, how), Image.open(path) as picture:
        if side is not None:
            width, height = picture.size
            box = (
                central_box(width, height)
                if generator is None
                else random_box(width, height, generator)
            )
            picture = picture.convert("RGB").resize(
                (side, side), Image.Resampling.BILINEAR, box=box
            )
        array = np.array(picture.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)
