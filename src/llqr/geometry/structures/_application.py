"""In what form a step applies U, chosen by cost after each refresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ._low_rank import beside_identity

__all__ = ["ERROR", "Application", "compress_factors", "multiply_left", "multiply_right"]

#: "full": the state as it is. "bfloat16": in lower precision. "low-rank": factors near the
#: identity as I + L R', to within ``ERROR``.
Application = Literal["full", "bfloat16", "low-rank"]

#: What |V g - U g| is at most of |U| |g|, for V in the place of U.
ERROR = 1e-3

# Measured in float32 on one core with AVX-512, on 8 blocks of 512 x 512; only their ratios count.
FLOPS_PER_SECOND = 1.2e11
SECONDS_PER_ENTRY = 8e-10  # of the blocks, in each product
SECONDS_PER_CALL = 2e-6


def seconds_of_product(entries: int, side: int, calls: int) -> float:
    """Return the estimated seconds of a product with a (side, side) matrix, or of parts of one.

    Args:
        entries: of the blocks that are multiplied.
        side: of the matrix, or for a matrix of rank k in two factors 2 k.
        calls: how many matrix products.
    """
    arithmetic = 2 * entries * side / FLOPS_PER_SECOND
    return arithmetic + calls * (entries * SECONDS_PER_ENTRY + SECONDS_PER_CALL)


def compress_factors(
    state: Mapping[str, Tensor], names: Mapping[str, int], entries: int, symmetric: bool
) -> dict[str, Tensor]:
    """Return the state with factors M near the identity as I + L R', where that is faster.

    A factor that acts c times has the share 1 / c of the error; those that are farther from the
    identity than their rank pays for stay whole.

    Args:
        state: with the factors as (b, n, n).
        names: the factors, and how often all of them act in one application.
        entries: of the blocks that they act on.
        symmetric: whether I + L R' is to be symmetric, as the factors are.
    """
    applied = dict(state)
    for name, uses in names.items():
        n = state[name].shape[-1]
        whole = seconds_of_product(entries, n, 1)
        ranks = range(n // 2, -1, -1)
        pays = (k for k in ranks if seconds_of_product(entries, 2 * k, 2) < whole)
        # Rank 0 needs no product at all.
        parts = beside_identity(state[name], ERROR / uses, next(pays, 0), symmetric)
        if parts is not None:
            del applied[name]
            applied[f"{name} left"], applied[f"{name} right"] = parts
    return applied


def multiply_left(
    state: Mapping[str, Tensor], name: str, x: Tensor, *, transposed: bool = False
) -> Tensor:
    """Return M x (or M'x) for a factor M of an applied state: whole, or I + L R'."""
    if name in state:
        return torch.bmm(state[name].mT if transposed else state[name], x)
    left, right = _parts_of(state, name, transposed)
    # x + L (R'x), and x itself at rank zero
    return torch.baddbmm(x, left, torch.bmm(right.mT, x)) if left.shape[-1] else x


def multiply_right(
    state: Mapping[str, Tensor], name: str, x: Tensor, *, transposed: bool = False
) -> Tensor:
    """Return x M (or x M') for a factor M of an applied state: whole, or I + L R'."""
    if name in state:
        return torch.bmm(x, state[name].mT if transposed else state[name])
    left, right = _parts_of(state, name, transposed)
    # x + (x L) R', and x itself at rank zero
    return torch.baddbmm(x, torch.bmm(x, left), right.mT) if left.shape[-1] else x


def _parts_of(state: Mapping[str, Tensor], name: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return L and R of M = I + L R', or of its transpose."""
    left, right = state[f"{name} left"], state[f"{name} right"]
    return (right, left) if transposed else (left, right)
