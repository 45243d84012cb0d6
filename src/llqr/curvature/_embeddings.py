"""Embeddings whose backward is not the derivative of their forward: as a surrogate's that is."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._moved_parameters import are_moved, value_before_move

__all__ = ["consistent_embedding", "refuse_scaled_bag"]


def consistent_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return ``F.embedding(...)``, every derivative of which follows its backward pass.

    ``scale_grad_by_freq`` divides the gradient of a row by how often it is looked up, but no second
    derivative; the gradient of the row ``padding_idx`` is zero, but forward mode and differences
    let it move.
    """
    padded = padding_idx is not None and (forward_ad._current_level >= 0 or are_moved())
    if scale_grad_by_freq or padded:
        factor = _inverse_counts(input, weight) if scale_grad_by_freq else torch.ones_like(weight)
        if padding_idx is not None:
            factor = factor.index_fill(0, torch.tensor([padding_idx], device=weight.device), 0)
        weight = _with_gradient_times(factor, weight)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, False, sparse)


def refuse_scaled_bag() -> NoReturn:
    """Refuse ``EmbeddingBag(scale_grad_by_freq=True)``.

    It has no second derivative, and torch 2.13 divides on the CPU by the counts of other rows.
    """
    raise ValueError(
        "forward: the backward of EmbeddingBag(scale_grad_by_freq=True) is not the derivative of "
        "its forward, so that C would not be symmetric; leave the option out, or sum the rows of "
        "an nn.Embedding with it"
    )


def _inverse_counts(input: Tensor, weight: Tensor) -> Tensor:
    """Return 1 / (how often a row is looked up), one row per row of the weight."""
    counts = torch.bincount(input.detach().reshape(-1), minlength=len(weight))
    return counts.clamp(min=1).to(weight.dtype).reciprocal()[:, None]


def _with_gradient_times(factor: Tensor, x: Tensor) -> Tensor:
    """Return x bit for bit, whose derivative is the factor: in all three ways of taking it."""
    x0 = value_before_move(x)
    scaled = factor * x
    return x0 + (scaled - factor * x0)
