"""Curvature samples as the parts of U take them, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .._allocations import bytes_of
from .._devices import widen
from .layout import Layout
from .structures import States
from .structures.closed_form import ClosedForm

__all__ = ["are_finite", "are_squarable", "own_samples", "peak_bytes", "samples_by_part"]


def samples_by_part(
    layout: Layout, parts: Sequence[ClosedForm], drawn: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Yield the samples of each part, (m, count, *shape) or (m, n) for blocks of any length.

    Args:
        layout: of the parameters.
        parts: the blocks of U in this process.
        drawn: {name: (m, *shape)}; emptied, so that most samples are held once.
    """
    if layout.ranks is not None:  # of all processes, for the shard of this one
        joined = []
        for i in range(len(next(iter(drawn.values())))):
            of_all = layout.pack_all_shards({n: w[i] for n, w in drawn.items()})
            joined.append(layout.shards_of_all_ranks(of_all))
        drawn.clear()
        flat = torch.cat(joined)
        joined.clear()
        for part in parts:
            yield own_samples(part, flat)
        return
    names = [{s.name for s, _ in part.group.slice_offsets} for part in parts]
    for i, part in enumerate(parts):
        own = _gather(layout, part, {n: drawn[n] for n in names[i]})
        for name in names[i].difference(*names[i + 1 :]):
            del drawn[name]  # no later part has a slice of it
        yield part.group.shape_samples(own)
        del own


def _gather(layout: Layout, part: ClosedForm, drawn: dict[str, Tensor]) -> Tensor:
    """Return the part's entries of all samples, (m, n)."""
    like = next(iter(drawn.values()))
    own = like.new_empty(len(like), part.group.numel, dtype=part.group.dtype)
    for i, row in enumerate(own):
        sample = [drawn[s.name][i] for s, _ in part.group.slice_offsets]
        part.group.shape_blocks(row).copy_(layout.gather_blocks(part.group, sample))
    return own


def own_samples(part: ClosedForm, flat: Tensor) -> Tensor:
    """Return the part's entries of flat vectors (m, P), as its functions take them."""
    group = part.group
    own = flat[:, group.start : group.start + group.numel]
    return group.shape_samples(own.to(group.dtype))


def are_squarable(drawn: Sequence[Tensor]) -> bool:
    """Tell whether all entries are finite, and so are sums of their squares."""
    filled = [w for w in drawn if w.numel()]
    if not filled:
        return True
    device = filled[0].device
    largest = [widen(torch.stack(w.aminmax()).abs().max()).to(device) for w in filled]
    # Python's numbers, since float32 would overflow in the product; a NaN is in no range.
    return all(
        0 <= value and value * value < torch.finfo(w.dtype).max / w.numel()
        for w, value in zip(filled, torch.stack(largest).tolist(), strict=True)  # one read
    )


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all entries are finite."""
    filled = (t for t in tensors if t.numel())
    return all(bool(torch.stack(t.aminmax()).isfinite().all()) for t in filled)


def peak_bytes(layout: Layout, parts: Sequence[ClosedForm], states: States, samples: int) -> int:
    """Return the most that a refresh holds at a time, beside the graph of its forward.

    Args:
        layout: of the parameters.
        parts: the blocks of U in this process.
        states: of the parts.
        samples: how many each process draws.
    """
    size, ranks = layout.dtype.itemsize, layout.ranks
    vector = size * sum(math.prod(view.shape) for view in layout.views.values())
    drawn, gradient = samples * vector, size * layout.numel
    held = [size * samples * part.group.numel for part in parts]
    peaks = [drawn + vector]  # the last backward pass, with the gradients of all
    if ranks is not None:  # what was drawn here, and what came of all processes, twice for a while
        held = [ranks.size * own for own in held]
        peaks += [gradient + drawn + sum(held) + 2 * vector, gradient + 2 * sum(held)]
        drawn = sum(held)
    kept = gradient
    for part, state, own in zip(parts, states, held, strict=True):
        count = own // max(1, size * part.group.numel)
        device = next((v.device for v in state.values()), torch.device("cpu"))
        peaks.append(kept + drawn + part.work_bytes(count, device))
        if ranks is None:  # gathered, and not yet released where it was drawn
            peaks.append(kept + drawn + own)
            drawn -= own
        kept += bytes_of(state)
    return max(*peaks, kept + 2 * gradient)  # and at the end M and its power, of all parts
