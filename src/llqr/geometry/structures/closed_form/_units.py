"""Which blocks have no samples yet, and which a refresh leaves as they are.

A mask has an entry for each row of the state: a block, or an entry of an elementwise structure.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from .._base import State, Structure

__all__ = ["choose", "expand_mask", "mask_of_parameters", "mask_without_samples"]


def mask_of_parameters(part: Structure, names: Collection[str], device: torch.device) -> Tensor:
    """Return the mask of what belongs to these parameters only."""
    if part.elementwise:
        slices = [s for s, _ in part.group.slice_offsets]
        runs = [torch.full((s.numel,), s.name in names, device=device) for s in slices]
        return torch.cat(runs)
    held = [all(s.name in names for s in block.slices) for block in part.group.blocks]
    return torch.tensor(held, device=device)


def mask_without_samples(part: Structure, moments: Tensor) -> Tensor:
    """Return the mask of blocks (of parameters, if elementwise) whose second moments are zero."""
    if not part.elementwise:
        return ~moments.reshape(part.count, math.prod(moments.shape[1:])).any(1)
    runs = [moments[start : start + s.numel] for s, start in part.group.slice_offsets]
    return torch.cat([~run.any().expand(len(run)) for run in runs])


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask of rows as one that broadcasts over a tensor."""
    return mask.view(-1, *[1] * (like.dim() - 1))


def choose(mask: Tensor, a: State, b: State) -> State:
    """Return the rows of a where the mask holds, else those of b."""
    return {key: torch.where(expand_mask(mask, b[key]), a[key], b[key]) for key in b}
