"""Checks that maps which should be linear, transposes of each other or symmetric, are so.

Each compares two numbers that are equal in exact arithmetic. The direction is mixed from random
numbers and from an image of the map itself, so that neither number is small by accident.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._devices import widest_dtype
from .._random import random_normal
from ._differences import random_direction

__all__ = [
    "are_transposes",
    "direction_along",
    "inner_product",
    "is_homogeneous",
    "is_symmetric",
    "nearly_equal",
    "norm",
    "random_cotangents",
]

Vectors = Sequence[Tensor | None]
LinearMap = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]

#: The relative error that is allowed in low precision; in a higher one less is.
LARGEST_ERROR = 0.05


def inner_product(a: Vectors, b: Vectors) -> float:
    """Return Re(a'b) in float64; None is zero, and complex numbers are pairs of real ones."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    products = [(x.detach().conj() * y.detach()).real for x, y in pairs]
    return sum(float(p.sum(dtype=widest_dtype(p.device))) for p in products)


def norm(v: Vectors) -> float:
    """Return the length of a list of tensors."""
    return math.sqrt(inner_product(v, v))


def direction_along(image: Vectors, parameters: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return a random direction plus one along ``image``, both as long as the parameters."""
    random = random_direction(parameters, seed)
    length = norm(random) / max(norm(image), sys.float_info.min)
    if not 0 < length < float("inf"):
        return random
    return [r if v is None else r + length * v.detach() for r, v in zip(random, image, strict=True)]


def random_cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Return random numbers shaped like outputs, whose sum over entries is a mean."""
    return [random_normal(z.shape, z.dtype, seed).to(z.device) / max(1, z.numel()) for z in outputs]


def is_homogeneous(linear_map: LinearMap, v: Sequence[Tensor]) -> bool:
    """Tell whether A(s v) = s A v, for small and large s: a map that clips is not.

    Powers of two, so that a linear map gives the same digits; float16 has room for small ones.
    """
    image = linear_map(v)
    size = norm(image)
    half = any(x.dtype == torch.float16 for x in v)
    for scale in (2.0**-3, 2.0**3) if half else (2.0**-14, 2.0**7, 2.0**14):
        scaled = linear_map([x * scale for x in v])
        pairs = [(a, b) for a, b in zip(image, scaled, strict=True) if a is not None]
        rest = norm([a.detach() - (0 if b is None else b.detach() / scale) for a, b in pairs])
        if not rest <= LARGEST_ERROR * size and size < float("inf"):
            return False
    return True


def are_transposes(
    v: Sequence[Tensor],
    transposed: Callable[[Sequence[Tensor]], Vectors],
    forward: LinearMap,
    parameters: Sequence[Tensor],
    by_differences: bool = False,
) -> bool:
    """Tell whether <J'v, d> = <v, J d>."""
    jv = transposed(v)
    d = direction_along(jv, parameters)
    return nearly_equal(inner_product(jv, d), inner_product(v, forward(d)), d, by_differences)


def is_symmetric(
    product: LinearMap, parameters: Sequence[Tensor], by_differences: bool = False
) -> bool:
    """Tell whether <b, C a> = <a, C b>."""
    a = random_direction(parameters)
    image = product(a)
    b = direction_along(image, parameters, seed=2)
    return nearly_equal(inner_product(b, image), inner_product(a, product(b)), a, by_differences)


def nearly_equal(
    sure: float, found: float, like: Sequence[Tensor], by_differences: bool = False
) -> bool:
    """Tell whether two numbers agree as far as the dtype and the way they are computed tell."""
    if not abs(sure) < float("inf"):  # then nothing can be said
        return True
    eps = max(torch.finfo(t.dtype).eps for t in like)
    rounding = 100 * math.pow(eps, 1 / 3) if by_differences else 30 * math.sqrt(eps)
    return abs(sure - found) <= min(LARGEST_ERROR, rounding) * max(abs(sure), abs(found))
