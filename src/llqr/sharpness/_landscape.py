"""Slices of the loss along one or two directions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_choice, check_integer, check_number, short_repr
from .._warnings import warn_caller
from ._data import Data, Forwards, Parameters, Progress, generator_of, measuring
from ._mean_loss import MeanLoss
from ._measurement import Effort, Measurement, error_text

__all__ = ["Landscape", "landscape"]

Normalise = Literal["filter", "none"]
Direction = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Landscape(Measurement):
    """The loss on a line or a plane through the weights.

    Attributes:
        coordinates: (points,), in units of the directions; the same along each of them.
        losses: (points,) or (points, points), the first direction first; entries may be infinite
            or NaN where the loss is.
        standard_errors: of the losses between the batches; None with one.
        directions: one or two, shaped like the parameters.
    """

    coordinates: Tensor
    losses: Tensor
    standard_errors: Tensor | None
    directions: list[tuple[Tensor, ...]]

    unit = "loss"

    def __str__(self) -> str:
        points = " x ".join(map(str, self.losses.shape))
        kind = {1: "line", 2: "plane"}[self.losses.dim()]
        middle = (len(self.coordinates) // 2,) * self.losses.dim()
        centre, errors = self.losses[middle], self.standard_errors
        error = None if errors is None else float(errors[middle])
        finite = self.losses[self.losses.isfinite()]
        ends = f"{float(finite.min()):.4g} .. {float(finite.max()):.4g}" if len(finite) else "none"
        return (
            f"loss on a {kind} of {points} points within "
            f"{float(self.coordinates[-1]):g}: {ends}, {float(centre):.6g} at the centre "
            f"({error_text(error, self.batches, 'batch')}); "
            f"{self._effort()}"
        )


def landscape(
    forward: Forwards,
    parameters: Parameters,
    directions: int | Sequence[Direction] = 2,
    *,
    batches: Iterable[Any] | None = None,
    weights: Sequence[float] | None = None,
    radius: float = 1.0,
    points: int = 21,
    normalise: Normalise | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> Landscape:
    r"""Evaluate the loss on a line or a plane through the weights.

    .. math:: f(\alpha, \beta) = L(w + \alpha d_1 + \beta d_2)

    Filter normalisation gives each filter of a random direction (each entry of the first dimension
    of a tensor of two or more) the norm that it has in w, and leaves biases and norms' parameters
    where they are. Pictures of different networks then have the same scale.

    Args:
        forward: as in :func:`eigenvalues`.
        parameters: as there.
        directions: 1 or 2 for so many random directions, or a list of one or two, each a list of
            tensors shaped like the parameters (eigenvectors, a displacement, the way to other
            weights); what they say of frozen parameters is left out.
        batches: as there.
        weights: as there.
        radius: the coordinates reach from -radius to radius.
        points: of each coordinate, an odd number, so that the middle one is the weights.
        normalise: "filter" or "none"; default: "filter" for random directions, "none" for given
            ones.
        seed: of random directions.
        process_group: as there.
        progress: called after each point with (points done, of how many).

    Returns:
        :class:`Landscape`.

    Raises:
        ValueError: a direction does not fit the parameters, or an argument is out of its range.

    Warns:
        UserWarning: the loss is the same at all points.

    Source: H. Li et al., Visualizing the loss landscape of neural nets, NeurIPS 2018.

    Example:
        >>> import torch, llqr
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> def loss():
        ...     return (torch.tensor([4.0, 1.0]) * w.square()).sum() / 2
        >>> axis = [torch.tensor([1.0, 0.0])]
        >>> llqr.sharpness.landscape(loss, [w], [axis], points=3).losses.tolist()
        [2.0, 0.0, 2.0]
    """
    check_number("radius", radius, low=0, open_low=True)
    check_integer("points", points, low=3)
    if points % 2 == 0:
        raise ValueError(f"points: expected an odd number (the middle is w), got {points}")
    if normalise is not None:
        check_choice("normalise", normalise, Normalise)
    with measuring(forward, parameters, batches, weights, process_group) as data:
        found = _directions_of(directions, data, seed)
        if (normalise or ("filter" if isinstance(directions, int) else "none")) == "filter":
            found = [_filter_normalised(d, data) for d in found]
        effort = Effort(progress, points ** len(found))
        losses = MeanLoss(data)
        half = points // 2
        # From integers, so that the middle is zero to the bit.
        line = torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") * (radius / half)
        values = []
        for place in itertools.product(line.tolist(), repeat=len(found)):
            values.append(losses.losses(_combined(found, place) if any(place) else None))
            effort.count()
        each = torch.stack(values, 1)  # (B, points^n)
        mean = data.mean(each)
        if bool((mean == mean[0]).all()):
            warn_caller(
                "landscape: the loss is the same at all points; is it computed with these "
                "parameters, and does the direction move them?"
            )
        shape = (points,) * len(found)
        errors = data.standard_error(each)
        return Landscape(
            coordinates=line,
            losses=mean.view(shape),
            standard_errors=None if errors is None else errors.view(shape),
            directions=[data.spread(d) for d in found],
            **effort.fields(data),
        )


def _directions_of(directions: int | Sequence[Direction], data: Data, seed: int) -> list[Tensor]:
    """Return one or two flat directions, random or as given."""
    if isinstance(directions, int) and not isinstance(directions, bool):
        if directions not in (1, 2):
            raise ValueError(
                f"directions: expected 1 or 2, or a list of directions, got {directions}"
            )
        generator = generator_of(seed)
        return [data.random_vector(generator) for _ in range(directions)]
    if not (isinstance(directions, Sequence) and len(directions) in (1, 2)):
        raise ValueError(
            "directions: expected 1 or 2, or a list of one or two directions, got "
            f"{short_repr(directions)}; one direction goes in a list: [direction]"
        )
    found = []
    for number, direction in enumerate(directions):
        tensors = [direction] if isinstance(direction, Tensor) else direction
        if not (isinstance(tensors, Sequence) and all(isinstance(t, Tensor) for t in tensors)):
            raise ValueError(
                f"directions: number {number} is {short_repr(direction)}, expected a list of "
                "tensors shaped like the parameters"
            )
        shapes, expected = ([tuple(t.shape) for t in ts] for ts in (tensors, data.parameters))
        if shapes != expected:
            raise ValueError(
                f"directions: number {number} has the shapes {shapes}, the parameters {expected}; "
                "each direction is a list of as many tensors as there are parameters"
            )
        active = [t for t, p in zip(tensors, data.parameters, strict=True) if p.requires_grad]
        found.append(data.flatten(active))
    return found


def _combined(directions: list[Tensor], place: Sequence[float]) -> Tensor:
    d = directions[0] * place[0]
    return d if len(place) == 1 else d.add_(directions[1], alpha=place[1])


def _filter_normalised(d: Tensor, data: Data) -> Tensor:
    """Return a direction whose filters have the norms of those of the weights."""
    return data.flatten(
        _with_filter_norms(t, p.detach())
        for t, p in zip(data.unflatten(d), data.active, strict=True)
    )


def _with_filter_norms(t: Tensor, w: Tensor) -> Tensor:
    """Return one tensor with the filter norms of another, or zeros for a vector."""
    if t.dim() < 2:
        return torch.zeros_like(t)
    rows, filters = t.flatten(1), w.flatten(1).to(t.dtype)
    norms = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
    scaled: Tensor = rows * (filters.norm(dim=1, keepdim=True) / norms)
    return scaled.view_as(t)
