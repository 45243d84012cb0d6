"""The passes of a refresh, without its checks: they run where tensors have no numbers.

On the meta device, under :class:`llqr._allocations.Allocations` or torch's FlopCounterMode, this
counts what linearising a network and multiplying by its curvature take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

from .._autocast import autocast_overruled
from ._curvatures import Curvature, as_curvature
from ._forwards import Forward, differentiable_in, split_loss_and_outputs
from ._graphs import gradients_of
from ._output_hessian import OutputHessian
from ._twice_differentiable import twice_differentiable
from .expansions._output_jacobian import JacobianByDoubleBackward
from .linearised import ReplacedOperations

__all__ = ["RehearsedModel"]


class RehearsedModel:
    """Linearise a forward and multiply by its curvature, as a refresh does, unchecked.

    Args:
        forward: returns ``(loss, outputs)``.
        parameters: the tensors to differentiate by, also on the meta device.
        curvature: as in :func:`llqr.quadratic_model`.

    Attributes:
        gradient: g; None for a parameter that took no part.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2, device="meta")
        >>> x, y = torch.empty(4, 3, device="meta"), torch.empty(4, dtype=int, device="meta")
        >>> def forward():
        ...     z = layer(x)
        ...     return torch.nn.functional.cross_entropy(z, y), z
        >>> model = RehearsedModel(forward, layer.parameters())
        >>> [tuple(v.shape) for v in model.product(model.gradient)]
        [(2, 3), (2,)]
    """

    def __init__(
        self,
        forward: Forward,
        parameters: Iterable[Tensor],
        curvature: Literal["fisher", "newton"] | Curvature = "fisher",
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        curvature = as_curvature(curvature)
        self._hessian: OutputHessian | None = None
        with autocast_overruled(), twice_differentiable():
            if not curvature.gauss_newton:
                loss, _ = split_loss_and_outputs(forward())
                self.gradient = gradients_of([loss], self._parameters, create_graph=True)
                return
            with ReplacedOperations():
                loss, outputs = split_loss_and_outputs(forward())
            zs = differentiable_in(outputs)
            self._jacobian = JacobianByDoubleBackward(loss, zs, self._parameters, lambda: zs)
            self.gradient = self._jacobian.loss_gradient
            self._hessian = OutputHessian(curvature.objective, loss, outputs, zs, check=False)

    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return C d."""
        with twice_differentiable():
            if self._hessian is None:  # d -> the gradient of d'g
                pairs = [(g, x) for g, x in zip(self.gradient, d, strict=True) if g is not None]
                return gradients_of([g for g, _ in pairs], self._parameters, [x for _, x in pairs])
            # d -> J d -> H J d -> J' H J d
            return self._jacobian.transposed_product(
                self._hessian.product(self._jacobian.product(d))
            )

    def sample(self) -> list[Tensor | None]:
        """Return J'v for one v in the outputs: what a curvature sample takes."""
        return self._jacobian.transposed_product(self._jacobian.outputs)
