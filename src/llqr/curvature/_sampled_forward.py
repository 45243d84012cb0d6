"""One forward of which samples are drawn: its loss, its gradient, and w = J' H^(1/2) e."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._autocast import autocast_overruled
from ._curvatures import Curvature, square_root_of
from ._forwards import Forward, RepeatableForward, differentiable_in, split_loss_and_outputs
from ._graphs import custom_functions_in, gradients_of, release_failed_backward
from ._twice_differentiable import twice_differentiable

__all__ = ["SampledForward"]

Result = TypeVar("Result")


class SampledForward:
    """The samples, loss and gradient of one forward.

    Args:
        forward: what to sample.
        parameters: the tensors to differentiate by, all of which require grad.
        curvature: which matrix C is.
        keep: whether the graph is kept for what is asked next; if not, loss and gradient are.
    """

    def __init__(
        self, forward: Forward, parameters: list[Tensor], curvature: Curvature, keep: bool
    ) -> None:
        self._forward = RepeatableForward(forward, parameters)
        self._parameters, self._curvature, self._keep = parameters, curvature, keep
        self._graph: _Graph | None = None
        self._loss: Tensor | None = None
        self._gradient: list[Tensor | None] | None = None

    @property
    def loss(self) -> Tensor:
        """The loss, detached."""
        return self._use(lambda graph: graph.loss) if self._loss is None else self._loss

    @property
    def gradient(self) -> list[Tensor | None]:
        """The gradient; None for a parameter that took no part."""
        if self._gradient is None:
            self._gradient = self._use(lambda graph: graph.gradient())
        return self._gradient

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor | None]:
        """Return ``count`` samples of every parameter; None is zero."""
        return self._use(lambda graph: graph.draw(count, generator))

    def _use(self, use: Callable[[_Graph], Result]) -> Result:
        # Around all of it: activation checkpointing runs parts of the forward again in a backward
        # pass, and must meet the same kernels.
        with autocast_overruled(), twice_differentiable():
            try:
                if self._graph is None:
                    self._graph = _Graph(self._forward, self._parameters, self._curvature)
                    self._loss = self._graph.loss
                result = use(self._graph)
                if not self._keep and self._gradient is None:
                    self._gradient = self._graph.gradient()
                return result
            except BaseException:
                # Whatever it is, the engine's hold on the graph must go with the error.
                self._graph = None
                release_failed_backward()
                raise
            finally:
                if not self._keep:
                    self._graph = None


class _Graph:
    """The graph of one run of a forward."""

    def __init__(
        self, forward: RepeatableForward, parameters: list[Tensor], curvature: Curvature
    ) -> None:
        self._scalar, self._outputs = split_loss_and_outputs(forward())
        if self._outputs is None:
            raise ValueError(
                f"forward returned only a loss, but curvature={curvature!r} needs what the loss "
                "was computed from; return (loss, outputs) with the logits as `outputs`"
            )
        self._parameters = parameters
        self._zs = differentiable_in(self._outputs)
        self._curvature = curvature
        self.loss = self._scalar.detach()
        custom_functions_in([self._scalar])

    @cached_property
    def _draw_at_outputs(self) -> Callable[..., list[Tensor]]:
        """Return H^(1/2) e for ``count`` and ``generator``."""
        if type(self._curvature).sample is not Curvature.sample:
            return partial(self._curvature.sample, self._scalar, self._outputs)
        # What H is, is found once for all draws.
        return square_root_of(self._curvature, self._scalar, self._outputs).draw

    def gradient(self) -> list[Tensor | None]:
        """Return the gradient of the loss."""
        return gradients_of([self._scalar], self._parameters)

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor | None]:
        """Return samples of every parameter, by one backward pass per sample."""
        samples: list[list[Tensor | None]] = []
        for cotangent in zip(*self._draw_at_outputs(count=count, generator=generator), strict=True):
            samples.append(self._transposed_product(cotangent))
        return [
            None if one[0] is None else torch.stack([w for w in one if w is not None])
            for one in zip(*samples, strict=True)
        ]

    def _transposed_product(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        vs = [x.to(z.dtype) for x, z in zip(v, self._zs, strict=True)]
        return gradients_of(self._zs, self._parameters, vs)
