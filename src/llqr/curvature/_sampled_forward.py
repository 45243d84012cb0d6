"""One forward of which samples are drawn: its loss, its gradient, and w = J' H^(1/2) e."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._autocast import autocast_overruled
from .._vectors import copy_all
from ._curvatures import Curvature, square_root_of
from ._exact_derivatives import ExactDerivatives
from ._forwards import (
    Forward,
    RepeatableForward,
    RepeatedOutputs,
    differentiable_in,
    split_loss_and_outputs,
)
from ._graphs import (
    UNSEEN,
    UnsuitableBackward,
    custom_functions_in,
    gradients_of,
    node_names_in,
    release_failed_backward,
    rounding_is_small,
)
from ._output_hessian import OutputHessian
from ._twice_differentiable import differentiable_repeatedly, tensor_hooks_noted
from .expansions._differences import central_difference, differ_too_much, random_direction
from .expansions._linear_maps import is_homogeneous, random_cotangents
from .expansions._saturation import saturation_told

__all__ = ["SampledForward"]

Result = TypeVar("Result")

#: How many numbers the samples of the outputs hold that are drawn at a time.
ENTRIES_AT_ONCE = 2**21

#: Kinds of forward and ids of parameters: of these the backward was checked.
_checked_models: set[Any] = set()


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

    def draw_into(
        self, rows: Sequence[Tensor], count: int, factor: float, generator: torch.Generator
    ) -> None:
        """Write ``count`` samples times a factor into tensors of shape (count, *p.shape)."""
        self._use(lambda graph: graph.draw_into(rows, count, factor, generator))

    def _use(self, use: Callable[[_Graph], Result]) -> Result:
        # Around all of it: activation checkpointing runs parts of the forward again in a backward
        # pass, and must meet the same kernels. Of a forward that takes a derivative itself, J' is a
        # second one.
        with autocast_overruled(), differentiable_repeatedly(), ExactDerivatives():
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
        self._forward = forward
        self._scalar, self._outputs = split_loss_and_outputs(forward())
        if self._outputs is None:
            raise ValueError(
                f"forward returned only a loss, but curvature={curvature!r} needs what the loss "
                "was computed from; return (loss, outputs) with the logits as `outputs`, in "
                "Lightning and the Hugging Face Trainer from refresh_step"
            )
        self._forward, self._parameters, self._curvature = forward, parameters, curvature
        self._zs = differentiable_in(self._outputs)
        self.loss = self._scalar.detach()
        self._custom_functions = custom_functions_in([self._scalar, *self._zs])
        if tensor_hooks_noted():
            self._custom_functions.append("a hook on a tensor")

    def gradient(self) -> list[Tensor | None]:
        """Return the gradient of the loss."""
        gradient = gradients_of([self._scalar], self._parameters)
        if all(g is None for g in gradient):
            raise ValueError(
                "forward: the loss does not depend on any of the parameters; compute it with the "
                "module whose parameters these are"
            )
        return gradient

    def draw_into(
        self, rows: Sequence[Tensor], count: int, factor: float, generator: torch.Generator
    ) -> None:
        """Write samples w = J'H^(1/2) e times a factor, by one backward pass each."""
        at_once = max(1, ENTRIES_AT_ONCE // max(1, sum(z.numel() for z in self._zs)))
        for start in range(0, count, at_once):
            n = min(at_once, count - start)
            samples = self._draw_at_outputs(count=n, generator=generator)
            self._check_shapes(samples, n)
            # Times a power of two, as a loss scale keeps numbers in the range of float16.
            largest = max((float(s.abs().max()) for s in samples if s.numel()), default=0.0)
            lift = 2.0 ** min(-math.frexp(largest)[1], 100)
            # One by one: a batched backward pass (vmap) takes two to four times the memory and is
            # faster only for small multilayer perceptrons, on a CPU and on a GPU.
            for k, s in enumerate(zip(*samples, strict=True), start):
                image = self._transposed_product([x * lift for x in s])
                written = [(row[k], w) for row, w in zip(rows, image, strict=True)]
                filled = [row for row, w in written if w is not None]
                copy_all(filled, [w for w in image if w is not None])
                for row in [row for row, w in written if w is None]:
                    row.zero_()
                if filled:
                    torch._foreach_mul_(filled, factor / lift)

    @cached_property
    def _draw_at_outputs(self) -> Callable[..., list[Tensor]]:
        """Return samples H^(1/2) e for ``count`` and ``generator``."""
        self._check_backward()
        if type(self._curvature).sample is not Curvature.sample:
            return partial(self._curvature.sample, self._scalar, self._outputs)
        # What H is, is found once for all draws.
        with saturation_told(self._forward, self._parameters, self._curvature.objective):
            root = square_root_of(self._curvature, self._scalar, self._outputs)
        if root.hessian.of_loss and (hidden := custom_functions_in([self._scalar], self._zs)):
            self._check_output_hessian(root.hessian, hidden)
        return root.draw

    def _check_backward(self) -> None:
        """Check that J'v is linear in v: always with a Function, else once for a model."""
        names = node_names_in([self._scalar, *self._zs])
        model = names, tuple((id(p), p.shape, p.dtype) for p in self._parameters)
        suspects = self._custom_functions
        known = model in _checked_models or not rounding_is_small(self._parameters, names)
        if known and not suspects:
            return
        if not is_homogeneous(self._transposed_product, random_cotangents(self._zs)):
            raise UnsuitableBackward(suspects or [UNSEEN], "J'v is not linear in v")
        _checked_models.add(model)

    def _check_output_hessian(self, hessian: OutputHessian, hidden: list[str]) -> None:
        """Compare H J d with differences of dL/dz: fused losses keep it as a constant."""
        d = random_direction(self._parameters)
        repeats = (RepeatedOutputs(self._forward, self._outputs, slope) for slope in (False, True))
        jd, hjd = (central_difference(f, self._parameters, d) for f in repeats)
        if differ_too_much(hessian.product(jd), hjd):
            raise UnsuitableBackward(hidden, "the second derivative of the loss is hidden")

    def _check_shapes(self, samples: Sequence[Tensor], count: int) -> None:
        expected = [(count, *z.shape) for z in self._zs]
        found = [tuple(s.shape) for s in samples]
        if found != expected:
            raise ValueError(
                f"curvature: sample of {self._curvature!r} returned tensors of shapes {found}; "
                f"expected {expected}, count samples of every output that carries a graph"
            )

    def _transposed_product(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        vs = [x.to(z.dtype) for x, z in zip(v, self._zs, strict=True)]
        return gradients_of(self._zs, self._parameters, vs)
