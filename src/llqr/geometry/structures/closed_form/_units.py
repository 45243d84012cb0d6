"""Which blocks have no samples yet, and which a refresh leaves as they are.

A mask has an entry for each row of the state: a block, or an entry of an elementwise structure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ...layout import Layout
from .._base import State, Structure

__all__ = ["choose", "expand_mask", "mask_of_parameters", "masks_without_samples"]


def mask_of_parameters(part: Structure, names: Collection[str], device: torch.device) -> Tensor:
    """Return the mask of what belongs to these parameters only."""
    if part.elementwise:
        slices = [s for s, _ in part.group.slice_offsets]
        runs = [torch.full((s.numel,), s.name in names, device=device) for s in slices]
        return torch.cat(runs)
    held = [all(s.name in names for s in block.slices) for block in part.group.blocks]
    return torch.tensor(held, device=device)


def masks_without_samples(
    layout: Layout, parts: Sequence[Structure], moments: Sequence[Tensor]
) -> list[Tensor]:
    """Return the masks of blocks (of parameters, if elementwise) whose second moments are zero.

    Args:
        layout: of the parameters.
        parts: the blocks of U in this process.
        moments: of the parts, on one device.
    """
    pairs = list(zip(parts, moments, strict=True))
    device = moments[0].device if moments else torch.device("cpu")
    index = {name: i for i, name in enumerate(layout.views)}
    filled = torch.zeros(len(index), device=device)
    for part, m in pairs:
        for s, start in part.group.slice_offsets if part.elementwise else ():
            filled[index[s.name]] += m[start : start + s.numel].any()
    # Each process may hold a run of a parameter.
    counts = layout.space.sum_over_shards(filled).tolist()
    empty = {name for name, count in zip(index, counts, strict=True) if not count}
    return [
        mask_of_parameters(part, empty, device)
        if part.elementwise
        else ~m.reshape(part.count, math.prod(m.shape[1:])).any(1)
        for part, m in pairs
    ]


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask of rows as one that broadcasts over a tensor."""
    return mask.view(-1, *[1] * (like.dim() - 1))


def choose(mask: Tensor, a: State, b: State) -> State:
    """Return the rows of a where the mask holds, else those of b; what is the same tensor stays."""
    return {
        key: y if a[key] is y else torch.where(expand_mask(mask, y), a[key], y)
        for key, y in b.items()
    }
