"""J, the Jacobian of the outputs in the parameters: one class per way of computing J d."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .._graphs import gradients_of, graph_of, leads_through
from ._differences import central_difference

__all__ = [
    "JacobianByDifferences",
    "JacobianByDoubleBackward",
    "JacobianByForwardMode",
    "OutputJacobian",
]


_dual_level = threading.RLock()


class OutputJacobian(ABC):
    """Products with J and J'; J is the chain of A_i and B_i in the paper's equation (8).

    Args:
        loss: the loss, computed from the outputs.
        outputs: the tensors z(parameters), with their graph.
        parameters: the tensors to differentiate by.
        repeat: computes the outputs again at the parameters' present values.

    Attributes:
        outputs: the tensors z.
        loss_gradient: the gradient of the loss, which one backward pass gives along with J.
    """

    loss_gradient: list[Tensor | None]

    def __init__(
        self,
        loss: Tensor,
        outputs: list[Tensor],
        parameters: list[Tensor],
        repeat: Callable[[], list[Tensor]],
    ) -> None:
        self.outputs, self._parameters, self._repeat = outputs, parameters, repeat
        self.loss_gradient = self._differentiate_loss(loss)

    def _differentiate_loss(self, loss: Tensor) -> list[Tensor | None]:
        return gradients_of([loss], self._parameters)

    @abstractmethod
    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return J d for every output; None is zero."""

    def transposed_product(self, v: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return J'v for every parameter; None is zero."""
        pairs = [(z, x) for z, x in zip(self.outputs, v, strict=True) if x is not None]
        if not pairs:
            return [None] * len(self._parameters)
        # v -> J'v is a plain backward pass, whichever way J d was computed.
        return gradients_of([z for z, _ in pairs], self._parameters, [x for _, x in pairs])


class JacobianByDoubleBackward(OutputJacobian):
    """Differentiate u -> J'u, which is linear, by u: its transpose is J."""

    def _differentiate_loss(self, loss: Tensor) -> list[Tensor | None]:
        # One VJP gives the gradient and the map u -> J'u: backpropagate the loss with cotangent 1
        # and the outputs with a cotangent u that is zero (of one number's memory), and keep the
        # graph in u.
        zeros = [z.detach().new_zeros(()).expand_as(z) for z in self.outputs]
        self._us = [zero.requires_grad_() for zero in zeros]
        if len(self.outputs) == 1 and leads_through(self.outputs[0], loss, self._parameters):
            # dL/dz first, so that no graph of the loss is kept but the one that H is taken from.
            (slope,), (u,) = gradients_of([loss], self.outputs), self._us
            cotangents = [u if slope is None else slope + u]
            gradient = gradients_of(self.outputs, self._parameters, cotangents, create_graph=True)
        else:
            gradient = gradients_of(
                [loss, *self.outputs],
                self._parameters,
                [torch.ones_like(loss), *self._us],
                create_graph=True,
            )
        # If a parameter reaches no output, its row of J' is zero and has no graph. Products need
        # the graphs, not what their ends are worth.
        self._transposed = [
            (i, graph_of(g)) for i, g in enumerate(gradient) if g is not None and g.requires_grad
        ]
        return [None if g is None else g.detach() for g in gradient]

    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return J d as d/du (d'J'u)."""
        if not self._transposed:
            return [None] * len(self._us)
        images = [g for _, g in self._transposed]
        # The point u = 0 does not matter: J'u is linear in u.
        return gradients_of(images, self._us, [d[i] for i, _ in self._transposed])


class JacobianByForwardMode(OutputJacobian):
    """Run the forward once more for every product, with dual numbers as parameters."""

    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return J d as the tangent of z(p + d epsilon)."""
        # Dual levels and filters of warnings belong to the process: one thread at a time.
        with _dual_level, warnings.catch_warnings(), forward_ad.dual_level(), torch.no_grad():
            # At its first use torch compiles decompositions through an interface it deprecates.
            warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
            make: Any = forward_ad.make_dual
            unpack: Any = forward_ad.unpack_dual
            duals = [make(p.detach(), v) for p, v in zip(self._parameters, d, strict=True)]
            with _ParametersSubstituted(self._parameters, duals):
                zs = [unpack(z) for z in self._repeat()]
            # An output that no parameter reaches has no tangent. Tangents end with their level.
            return [
                torch.zeros_like(z.primal) if z.tangent is None else z.tangent.clone() for z in zs
            ]


class JacobianByDifferences(OutputJacobian):
    """Run the forward twice more for every product, to either side of the parameters."""

    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return J d as (z(p + e d) - z(p - e d)) / 2e."""
        return [*central_difference(self._repeat, self._parameters, d)]


class _ParametersSubstituted(TorchFunctionMode):
    """Put other tensors in the places of parameters, in every torch function called."""

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._values = {id(p): v for p, v in zip(parameters, values, strict=True)}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with the other tensors."""
        args, kwargs = torch.utils._pytree.tree_map(self._value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _value_of(self, x: Any) -> Any:
        return self._values.get(id(x), x) if isinstance(x, Tensor) else x
