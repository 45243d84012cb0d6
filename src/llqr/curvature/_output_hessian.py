"""H, the second derivative of the curvature's objective in the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from .._warnings import warn_caller
from ._graphs import gradients_of, graph_of
from ._missing_derivative import missing_derivative_in
from ._random import random_normal

__all__ = ["LinearLoss", "OutputHessian", "SaturatedLoss"]

#: ``objective(loss, outputs, outputs0)``: the scalar D, or None for the loss itself.
Objective = Callable[[Tensor, Any, Any], Tensor | None]


class LinearLoss(ValueError):
    """A loss that has no second derivative in its outputs."""


class SaturatedLoss(LinearLoss):
    """A loss whose second derivative in its outputs has underflowed: it has one at smaller ones."""


class OutputHessian:
    """Products with H, the Q_N of the paper's equation (9), from the graph of dD/dz.

    Args:
        objective: says which scalar D of the outputs H is the second derivative of.
        loss: the loss, computed from the outputs.
        outputs: what the forward handed over.
        zs: the tensors of ``outputs`` that carry a graph: H is a matrix over them.
        check: refuse H = 0, and warn of an indefinite H.

    Attributes:
        of_loss: whether D is the loss itself.
        points: the tensors that products are taken at and lists run over, valued as ``zs``.

    Raises:
        ValueError: the loss was not computed from the outputs, or one output from another.
        LinearLoss: H is zero.
    """

    def __init__(
        self,
        objective: Objective,
        loss: Tensor,
        outputs: Any,
        zs: list[Tensor],
        check: bool = True,
    ) -> None:
        scalar, self.points = _scalar_and_points(objective, loss, outputs, zs)
        gradient = gradients_of([scalar], self.points, create_graph=True)
        pairs = [(g, z) for g, z in zip(gradient, self.points, strict=True) if g is not None]
        if not pairs:
            raise ValueError(
                "the loss was not computed from `outputs`: return the very tensor that the loss "
                "function was given (not a detached or recomputed copy)"
            )
        self.of_loss = scalar is loss
        # Products need the graph of the gradient, not its values. One without a graph is constant:
        # its row of H is zero.
        self._gradient: list[tuple[Tensor | GradientEdge, Tensor]] = [
            (graph_of(g), z) for g, z in pairs if g.requires_grad
        ]
        self._indefinite = check and self._check_curvature([g for g, _ in pairs])

    def product(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return H v as d/dz (v'dD/dz); None is zero."""
        v_at = dict(zip(map(id, self.points), v, strict=True))
        pairs = [(g, x) for g, z in self._gradient if (x := v_at[id(z)]) is not None]
        if not pairs:
            return [None] * len(self.points)
        return gradients_of([g for g, _ in pairs], self.points, [x for _, x in pairs])

    def bends(self) -> bool:
        """Tell whether H is not zero, from one random product."""
        images = self.product(self._draw_probes())
        return any(bool(h.isfinite().all()) and bool(h.any()) for h in images if h is not None)

    def _draw_probes(self) -> list[Tensor]:
        # Another seed per tensor: of a loss in z1 - z2 the same one would see nothing.
        return [_random_like(z, seed) for seed, z in enumerate(self.points)]

    def _check_curvature(self, gradient: Sequence[Tensor]) -> bool:
        """Refuse H = 0, and tell whether H is seen to be indefinite, from one random product."""
        probes = self._draw_probes()
        images = self._product_or_say_why_not(probes)
        pairs = [(v, h) for v, h in zip(probes, images, strict=True) if h is not None]
        if not any(bool(h.any()) for _, h in pairs):
            # A divergence is stationary at equality, with H or without; a loss whose gradient is
            # exactly zero is minimal: nothing to learn, nothing wrong.
            if self.of_loss and not any(bool(g.any()) for g in gradient):
                return False
            raise LinearLoss(
                "loss is linear in `outputs`, so its second derivative there is zero and U would "
                "grow without bound; return the logits (not log-probabilities) as `outputs`; if "
                "they are, they lie so far apart that training has diverged; if the loss is an "
                "autograd.Function, its backward must be differentiable"
            )
        # A mean loss bends by about 1 per output entry; if the network is certain it hardly bends
        # at all, and what is left is rounding of either sign.
        noise = max(torch.finfo(v.dtype).eps for v, _ in pairs) ** 0.5
        return bool(sum(_real_inner_product(v, h) for v, h in pairs) < -noise)

    def warn_if_indefinite(self) -> None:
        """Warn if H was seen not to be positive semidefinite."""
        if self._indefinite:
            warn_caller(
                "the second derivative of the loss in the outputs is not positive semidefinite: "
                "the curvature C is indefinite"
            )

    def _product_or_say_why_not(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        try:
            return self.product(v)
        except (RuntimeError, NotImplementedError) as error:
            operation = missing_derivative_in(error)
            if operation is None:
                raise
            raise ValueError(
                f"loss: {operation} has no second derivative in torch, and the curvature needs "
                "that of the loss in the outputs; use curvature='newton', which then takes "
                "differences, or llqr.Divergence with a divergence of the outputs"
            ) from error


def _random_like(z: Tensor, seed: int) -> Tensor:
    return random_normal(z.shape, z.dtype, seed).to(z.device)


def _real_inner_product(a: Tensor, b: Tensor) -> float:
    """Return Re(a'b): complex numbers are pairs of real ones to H."""
    return float((a.conj() * b).real.sum())


def _scalar_and_points(
    objective: Objective, loss: Tensor, outputs: Any, zs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return a scalar and the tensors in which its second derivative is H."""
    constant = pytree.tree_map(lambda z: z.detach() if isinstance(z, Tensor) else z, outputs)
    free_copy = {id(z): z.detach().requires_grad_() for z in zs}
    free = pytree.tree_map(lambda z: free_copy.get(id(z), z), outputs)
    scalar = objective(loss, free, constant)
    if scalar is not None:
        return scalar, [free_copy[id(z)] for z in zs]
    # The loss is known only as a node above the outputs, so its derivative in one output must not
    # run through another.
    for i, z in enumerate(zs if len(zs) > 1 else []):
        others = zs[:i] + zs[i + 1 :]
        below = gradients_of([z], others, [torch.ones_like(z)])
        if any(b is not None for b in below):
            raise ValueError(
                "forward: one tensor of `outputs` is computed from another; hand over only what "
                "the loss reads, or use llqr.Divergence for a metric on intermediate layers"
            )
    return loss, zs
