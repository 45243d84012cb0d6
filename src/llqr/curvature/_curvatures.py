"""Which matrix C is: the curvature of the loss that the geometry is learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import short_repr
from ._forwards import differentiable_in
from ._output_hessian import OutputHessian
from .sampling import OutputSquareRoot

__all__ = ["square_root_of", "Curvature", "Divergence", "Fisher", "Newton", "as_curvature"]


class Curvature:
    r"""Name the curvature :math:`C` of the quadratic model (base class).

    It is the matrix of the quadratic problem in the paper's equation (7) (there :math:`H`).

    A curvature of the Gauss-Newton form :math:`C = J^\top H J` (:math:`J` the Jacobian of the
    outputs in the parameters) says what scalar of the outputs has :math:`H` as its second
    derivative; :meth:`objective` returns it. :class:`Newton` is the one that is not of this form.
    """

    #: True when C is J' H J, and so needs the outputs of the network.
    gauss_newton: bool = True

    def objective(self, loss: Tensor, outputs: Any, outputs0: Any) -> Tensor | None:
        """Return a scalar of ``outputs`` whose second derivative is H, or None for the loss itself.

        Args:
            loss: the scalar loss, computed from the outputs.
            outputs: what the forward handed over (a tensor, or nested tuples, lists, dicts).
            outputs0: the same values, detached: the expansion point.
        """
        raise NotImplementedError

    def sample(
        self, loss: Tensor, outputs: Any, *, count: int, generator: torch.Generator
    ) -> list[Tensor]:
        r"""Draw samples :math:`s = H^{1/2} e`, with e white, so that :math:`E[s s^\top] = H`.

        What H is, is recognised from products with it: that of a softmax cross-entropy
        (whatever its reduction, class weights, targets and layout) and a diagonal one have square
        roots in closed form; that of any other loss is applied by Lanczos. Override it if you
        know a faster way to draw.

        Args:
            loss: the scalar loss, computed from the outputs.
            outputs: what the forward handed over (a tensor, or nested tuples, lists, dicts).
            count: how many samples.
            generator: the only source of random numbers, on the CPU.

        Returns:
            One tensor (count, \*z.shape) for each tensor z of ``outputs`` that carries a graph.

        Raises:
            ValueError: H is not positive semidefinite, or the outputs are complex.
            LinearLoss: H is zero.

        Example:
            >>> import torch, llqr
            >>> z = torch.randn(5, 3, requires_grad=True)
            >>> loss = torch.nn.functional.cross_entropy(z, torch.tensor([0, 1, 2, 1, 0]))
            >>> generator = torch.Generator().manual_seed(0)
            >>> [s.shape for s in llqr.Fisher().sample(loss, z, count=4, generator=generator)]
            [torch.Size([4, 5, 3])]
        """
        return square_root_of(self, loss, outputs).draw(count, generator)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def square_root_of(curvature: Curvature, loss: Tensor, outputs: Any) -> OutputSquareRoot:
    """Return H^(1/2), which ``Curvature.sample`` applies to random vectors."""
    check_has_samples(curvature)
    zs = differentiable_in(outputs)
    return OutputSquareRoot(OutputHessian(curvature.objective, loss, outputs, zs))


def check_has_samples(curvature: Curvature) -> None:
    """Refuse a curvature that is not of the form J' H J."""
    if not curvature.gauss_newton:
        raise ValueError(
            f"curvature: {curvature!r} has no samples, since it is not of the form J' H J with H "
            "positive semidefinite; use 'fisher' or a llqr.Divergence"
        )


class Fisher(Curvature):
    r"""Use the second derivative of the loss in the outputs: :math:`C = J^\top \ell''(z) J`.

    For a cross-entropy on logits this is the Fisher information (the paper's NGD geometry): labels
    and label smoothing drop out; class weights, ``ignore_index`` and masks stay in.

    Example:
        >>> import llqr
        >>> llqr.LLQR("diagonal", curvature=llqr.Fisher()).curvature
        Fisher()
    """

    def objective(self, loss: Tensor, outputs: Any, outputs0: Any) -> Tensor | None:
        """Return None: H is the second derivative of the loss itself."""
        # For a cross-entropy on logits l'' = diag(p) - p p' in every row: no label is in it.
        return None


class Newton(Curvature):
    r"""Use the Hessian of the whole loss, :math:`C = \nabla^2 L(\theta)`; it may be indefinite."""

    gauss_newton = False


class Divergence(Curvature):
    r"""Use the second derivative of a divergence of the outputs from their present values.

    .. math:: C = J^\top H J, \qquad H = \partial_z^2 D(z, z_0) \big|_{z = z_0}

    Kullback-Leibler in either direction gives the Fisher, a Renyi divergence of order a gives a
    times it, and a divergence that looks at intermediate features gives an intermediate-layer
    metric (paper, appendix A).

    Args:
        divergence: ``divergence(outputs, outputs0) -> scalar``, twice differentiable in
            ``outputs``. Average over the batch if the loss does.

    Example:
        >>> import torch, llqr
        >>> def squared(z, z0):
        ...     return 0.5 * (z - z0).square().sum(-1).mean()
        >>> llqr.LLQR("diagonal", curvature=llqr.Divergence(squared)).curvature
        Divergence(squared)
    """

    def __init__(self, divergence: Callable[[Any, Any], Tensor]) -> None:
        if not callable(divergence):
            raise TypeError(
                f"divergence: expected a callable (outputs, outputs0) -> scalar, got {divergence!r}"
            )
        self.divergence = divergence

    def objective(self, loss: Tensor, outputs: Any, outputs0: Any) -> Tensor | None:
        """Return D(outputs, outputs0)."""
        # Only H is taken of it, the Q_N of the paper's equation (9): at outputs0 its gradient is
        # zero, and g is the loss's.
        value = self.divergence(outputs, outputs0)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                "divergence: expected a scalar tensor, got "
                + (f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value))
                + "; reduce it over the batch as the loss is reduced"
            )
        return value

    def __repr__(self) -> str:
        return f"Divergence({getattr(self.divergence, '__name__', self.divergence)})"


def as_curvature(curvature: str | Curvature) -> Curvature:
    """Turn ``"fisher"`` and ``"newton"`` into their objects; pass objects through."""
    if isinstance(curvature, Curvature):
        return curvature
    if curvature == "fisher":
        return Fisher()
    if curvature == "newton":
        return Newton()
    raise ValueError(
        f"curvature: expected 'fisher', 'newton' or a llqr.Curvature, got {short_repr(curvature)}"
    )
