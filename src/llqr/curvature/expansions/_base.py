"""What every way of expanding the loss of one forward offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from .._curvatures import Curvature
from .._exact_derivatives import ExactDerivatives
from .._forwards import (
    RepeatableForward,
    count_nonzero_rows,
    differentiable_in,
    split_loss_and_outputs,
    tensors_in,
)
from .._graphs import (
    UNSEEN,
    UnsuitableBackward,
    custom_functions_in,
    node_names_in,
    rounding_is_small,
)
from .._synchronised import couples_processes
from .._twice_differentiable import tensor_hooks_noted
from ._linear_maps import is_symmetric

__all__ = ["Expansion", "checked_kinds"]

#: Kinds of forward: whether replaced operations were right there.
checked_kinds: dict[Any, bool] = {}

#: Kinds of forward and ids of parameters: of these the backward was checked.
_checked_models: set[Any] = set()


class Expansion(ABC):
    """The loss of one forward to second order, by one way of differentiating.

    It holds what its products need, and nothing that holds it: when the last reference to it goes,
    so do the graphs. A RuntimeError that ``missing_derivative_in`` recognises says that the
    forward lacks a derivative this way needs.

    Args:
        forward: what to expand.
        parameters: the tensors to differentiate by. Directions and results are lists over them.
        curvature: which matrix C is.
        count_rows: whether to count ``rows``.
        suspect: whether another way found that backward and derivative differ.

    Attributes:
        loss: the loss, detached.
        gradient: g, detached; None for a parameter that took no part.
        rows: output rows whose loss gradient is not zero (1 if not counted).
    """

    #: What warnings call this way, and what they say of its cost.
    name: ClassVar[str]
    cost: ClassVar[str]
    #: Whether the first map of a product is itself computed by differences.
    by_differences: ClassVar[bool] = False
    #: Whether functions with wrong higher derivatives in torch run in elementary operations.
    exact: ClassVar[bool] = True

    gradient: list[Tensor | None]

    def __init__(
        self,
        forward: RepeatableForward,
        parameters: list[Tensor],
        curvature: Curvature,
        count_rows: bool = False,
        suspect: bool = False,
    ) -> None:
        self._parameters, self._suspect = parameters, suspect
        self._exact: AbstractContextManager[Any] = (
            ExactDerivatives() if self.exact else nullcontext()
        )
        with self._exact:
            self._expand(forward, curvature, count_rows, suspect)

    def _expand(
        self, forward: RepeatableForward, curvature: Curvature, count_rows: bool, suspect: bool
    ) -> None:
        loss, outputs = self._run_forward(forward)
        # Double backward says if an operation lacks it, unless a user's own Function hides the
        # dependence or computes in its backward something else than a derivative.
        self._unchecked = custom_functions_in([loss, *tensors_in(outputs)])
        if tensor_hooks_noted():
            self._unchecked.append("a hook on a tensor")
        # What the checks compare holds of the sums over processes, which only a product takes.
        self._coupled = couples_processes([loss, *tensors_in(outputs)])
        if self._coupled:
            self._unchecked = []
        self.loss = loss.detach()
        self.rows = 1
        if outputs is None and (curvature.gauss_newton or count_rows):
            raise ValueError(
                f"forward returned only a loss, but curvature={curvature!r} (scale "
                "'mean' or 'sum') needs what the loss was computed from; return "
                "(loss, outputs) with the logits as `outputs`, in Lightning and the Hugging Face "
                "Trainer from refresh_step"
            )
        self._kind = self._kind_of_forward(loss, outputs)
        self._prepare_products(forward, loss, outputs, curvature)
        model = self._kind, tuple(id(p) for p in self._parameters)
        if not self._unchecked and model not in _checked_models:
            self._check_backward(loss)
            _checked_models.add(model)
            checked_kinds[self._kind] = True
        if count_rows:
            self.rows = count_nonzero_rows(loss, differentiable_in(outputs))

    def _kind_of_forward(self, loss: Tensor, outputs: Any) -> tuple[Any, ...]:
        """Return what forwards of one kind have in common."""
        self._names = node_names_in([loss, *tensors_in(outputs)])
        return type(self), tuple((p.shape, p.dtype) for p in self._parameters), self._names

    @property
    def _can_be_judged(self) -> bool:
        """Whether a Function is known to be there, or rounding is too small to look like one."""
        if self._coupled:
            return False
        return bool(self._unchecked) or rounding_is_small(self._parameters, self._names)

    @property
    def _suspects(self) -> str:
        return ", ".join(self._unchecked) or UNSEEN

    def take_gradient(self) -> list[Tensor | None]:
        """Return the gradient, and let go of it if no product needs it."""
        return self.gradient

    def product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return C d, unscaled; None is zero."""
        # Also here: activation checkpointing runs parts of the forward again.
        with self._exact:
            if self._unchecked:
                self._check_custom_functions()
                self._unchecked = []
                checked_kinds.setdefault(self._kind, True)
            return self._curvature_product(d)

    def _run_forward(self, forward: RepeatableForward) -> tuple[Tensor, Any]:
        """Return (loss, outputs) with the graphs that this way differentiates."""
        result = forward()
        if isinstance(self._exact, ExactDerivatives) and self._exact.wanted_again:
            self._exact.begin_again()
            del result  # not two graphs at a time
            result = forward()
        return split_loss_and_outputs(result)

    @abstractmethod
    def _prepare_products(
        self, forward: RepeatableForward, loss: Tensor, outputs: Any, curvature: Curvature
    ) -> None:
        """Take the gradient, and keep what a product needs."""

    @abstractmethod
    def _curvature_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return C d, unscaled; None is zero."""

    @abstractmethod
    def _check_backward(self, loss: Tensor) -> None:
        """Check that the backward pass is linear, once for each kind of forward.

        Raises:
            MissingDerivative: this way lacks something that another one may have.
            ValueError: no way gives a symmetric C.
        """

    @abstractmethod
    def _check_custom_functions(self) -> None:
        """Check what users' own Functions may spoil.

        Raises:
            MissingDerivative: this way lacks something that another one may have.
            ValueError: no way gives a symmetric C.
        """

    def _keep_gradient(self, gradient: list[Tensor | None]) -> None:
        if all(g is None for g in gradient):
            raise ValueError(
                "forward: the loss does not depend on any of the parameters; compute it with the "
                "module whose parameters these are"
            )
        self.gradient = [None if g is None else g.detach() for g in gradient]

    def _check_symmetry(self) -> None:
        if not is_symmetric(self._curvature_product, self._parameters, self.by_differences):
            self._refuse_custom_functions("C would not be symmetric")

    def _refuse_custom_functions(self, reason: str) -> NoReturn:
        raise UnsuitableBackward([self._suspects], reason)
