"""The slot that a metric fills: the public base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .._allocations import bytes_of
from .._html import format_table
from .._vectors import SHAPE, Tensors
from ..distributed import Ranks
from ._report import RefreshReport
from .layout import unwrap_model

if TYPE_CHECKING:
    from ._bases import Bases

__all__ = ["Geometry", "NormStatistics"]

IS_FLOATING = Tensor.is_floating_point

NormStatistics = Literal["batch", "running"]


class Geometry:
    r"""A metric for the optimizer: how a gradient becomes :math:`U g` (base class).

    A subclass needs :meth:`apply`; it must be linear and symmetric positive definite in the
    gradients. A metric that learns from forwards also has :meth:`due` and :meth:`refresh`; one that
    learns from the gradients of each step has :meth:`observe`. What it learned is in :meth:`state`
    (tensors per parameter) and :meth:`counters` (numbers), so that checkpoints hold it, and
    :meth:`reset` forgets it. A metric whose blocks are those of a structure (diagonal, kfac, ...)
    starts from :class:`llqr.StructuredGeometry`, which does all but the learning.

    Example:
        >>> import torch, llqr
        >>> class Half(llqr.Geometry):
        ...     def apply(self, gradients):
        ...         return {name: 0.5 * g for name, g in gradients.items()}
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, geometry=Half())
        >>> _ = optimizer.minimize(lambda: model(torch.ones(1, 2)).sum())
    """

    #: The processes that train together (set by the optimizer).
    ranks: Ranks
    #: Whether each process holds a shard of U, so that all must apply it together, to the same g.
    sharded: bool = False

    @property
    def batch_norm(self) -> NormStatistics:
        """The statistics that a refresh sees in a BatchNorm in training mode.

        "batch": those of its minibatch, as in training; "running": those of evaluation mode.
        """
        return "batch"

    def bind(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Attach to a model and the parameters to precondition (called by the optimizer).

        Args:
            model: the network; ``inner_model`` is what DistributedDataParallel or torch.compile
                wrap, whose names are those of the parameters.
            parameters: names to tensors, in model order; default: all that require grad.

        Bound again with more parameters, a geometry keeps what it knows of the old ones.
        """
        if parameters is None:  # bound by hand, without an optimizer
            named = unwrap_model(model).named_parameters()
            parameters = {name: p for name, p in named if p.requires_grad}
        self.model, self.inner_model = model, unwrap_model(model)
        self.ranks = getattr(self, "ranks", None) or Ranks(model)
        self.parameters = dict(parameters)

    def apply(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return U g as {name: tensor} for the names given; absent gradients count as zero."""
        raise NotImplementedError

    def bases_for(self, tensors: Tensors) -> Bases | None:
        """Return the bases in which U is diagonal, or None if it has none.

        Args:
            tensors: what they are for, shaped like the parameters: their device counts.
        """
        return None

    def observe(self, gradients: Tensors) -> None:
        """See the clean gradients of a step that counted, unscaled, in float32 or float64."""

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` is to be called; the steps then keep their clean gradients."""
        return type(self).observe is not Geometry.observe

    def due(self, step: int) -> bool:
        """Tell whether a refresh is due before optimizer step ``step``."""
        return False

    def refresh(
        self,
        forwards: Sequence[Callable[[], Any]],
        *,
        step: int = 0,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Learn U anew from forwards on refresh minibatches; return a report."""
        raise RuntimeError(f"{type(self).__name__} has nothing to refresh")

    def spectrum(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalue of U for each layer."""
        raise NotImplementedError(f"{type(self).__name__} does not tell its spectrum")

    def numel(self) -> int:
        """Return the number of stored scalars."""
        return sum(v.numel() for entry in self.state().values() for v in entry.values())

    def memory(self) -> dict[str, int]:
        """Return bytes in this process; "preconditioner" is what U takes."""
        return {"preconditioner": bytes_of(self.state())}

    def summary(self) -> str:
        """Return a table of the parameters and how many scalars U stores for each."""
        self._require_bound()
        state = self.state()
        rows = [("parameter", "shape", "stored")]
        for name, parameter in self.parameters.items():
            stored = sum(v.numel() for v in state.get(name, {}).values())
            rows.append((name, shape_text(parameter), f"{stored:,}"))
        return format_table(rows, self._total_line())

    def _total_line(self) -> str:
        total = sum(p.numel() for p in self.parameters.values())
        return f"{total:,} parameters, {self.numel():,} scalars in U"

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the learned tensors as {parameter name: {key: tensor}}."""
        return {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over tensors that :meth:`state` returned."""

    def reset(self) -> None:
        """Forget what was learned: a checkpoint without a geometry was loaded."""

    def counters(self) -> dict[str, int]:
        """Return the learned numbers (integers)."""
        return {}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over numbers that :meth:`counters` returned."""

    def _check_gradients(self, gradients: Tensors) -> None:
        """Refuse gradients that are not those of the parameters."""
        self._require_bound()
        # Absent gradients count as zero; present ones must be those of the parameters.
        # Mapped without a loop in Python, since this runs twice per step over all parameters.
        known = [self.parameters[n] for n in gradients if n in self.parameters]
        given = list(gradients.values())
        if list(map(SHAPE, given)) == list(map(SHAPE, known)) and all(map(IS_FLOATING, given)):
            return
        for name, g in gradients.items():
            parameter = self.parameters.get(name)
            if parameter is None:
                raise KeyError(f"gradients: {name!r} is not a parameter that U knows")
            if g.shape != parameter.shape:
                raise ValueError(
                    f"gradients: {name!r} has shape {tuple(g.shape)}, its parameter "
                    f"{tuple(parameter.shape)}"
                )
            if not g.is_floating_point():
                raise ValueError(
                    f"gradients: {name!r} has dtype {g.dtype}, expected a real floating-point one"
                )

    def _require_bound(self) -> None:
        if not hasattr(self, "parameters"):
            raise RuntimeError(
                f"{type(self).__name__} is not bound to a model; pass it to llqr.Optimizer, or "
                "call .bind(model)"
            )


def shape_text(parameter: Tensor) -> str:
    """Return a shape as people write it: "64x3x3"."""
    return "x".join(map(str, parameter.shape)) or "scalar"
