"""The slot that a metric fills: the public base class, and a fixed metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ._modules import unwrap
from ._report import RefreshReport

__all__ = ["FixedGeometry", "Geometry"]

Gradients = Mapping[str, Tensor]


class Geometry:
    r"""A metric for the optimizer: how a gradient becomes :math:`U g` (base class).

    A subclass needs :meth:`apply`; it must be linear and symmetric positive definite in the
    gradients. A metric that learns also has :meth:`due` and :meth:`refresh`, and keeps what it
    learned in :meth:`state` (tensors per parameter) and :meth:`counters` (numbers), so that
    checkpoints hold it.

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

    #: The processes that train together (set by the optimizer), and whether each needs the others
    #: to apply U, which then must be applied to the same gradient in all.
    ranks: Ranks
    shared = False

    def bind(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Meet the model and the parameters to precondition (called by the optimizer).

        Args:
            model: the network; wrappers such as DistributedDataParallel are looked through.
            parameters: names to tensors, in model order; default: all that require grad.

        Bound again with more parameters, a geometry keeps what it knows of the old ones.
        """
        if parameters is None:
            named = unwrap(model).named_parameters()
            parameters = {name: p for name, p in named if p.requires_grad}
        self.model = model
        self.ranks = getattr(self, "ranks", None) or Ranks(model)
        self.parameters = dict(parameters)

    def apply(self, gradients: Gradients) -> dict[str, Tensor]:
        """Return U g as {name: tensor} for the names given; absent gradients count as zero."""
        raise NotImplementedError

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

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the learned tensors as {parameter name: {key: tensor}}."""
        return {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over tensors that :meth:`state` returned."""

    def counters(self) -> dict[str, int]:
        """Return the learned numbers (integers)."""
        return {}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over numbers that :meth:`counters` returned."""

    def _check(self, gradients: Gradients) -> None:
        """Refuse gradients that are not those of the parameters."""
        self._require_bound()
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
                f"{type(self).__name__} knows no parameters yet; hand it to llqr.Optimizer, or "
                "call .bind(model)"
            )


class FixedGeometry(Geometry):
    """Precondition with a matrix that never changes.

    Args:
        U: an (n, n) tensor on all parameters, flattened and concatenated in model order; or
            {parameter name: tensor}, each a number (0-dim), a tensor of the parameter's shape
            (elementwise), or a (numel, numel) matrix. Parameters not named keep U = I. All must
            be symmetric positive definite.

    Raises:
        ValueError: a name the model does not have, a shape that fits nothing, a matrix that is
            not symmetric positive definite.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> geometry = llqr.FixedGeometry(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        >>> geometry.bind(model)
        >>> geometry.apply({"weight": torch.ones(2, 1)})["weight"].flatten().tolist()
        [2.0, 0.5]
    """

    def __init__(self, U: Tensor | Mapping[str, Tensor]) -> None:
        self.U = U
        matrices = [("U", U)] if isinstance(U, Tensor) else [(f"U[{n!r}]", u) for n, u in U.items()]
        for label, matrix in matrices:
            if not isinstance(matrix, Tensor) or matrix.is_complex():
                raise TypeError(f"{label}: expected a real tensor, got {matrix!r}")
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"{label}: has entries that are not finite")

    def bind(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Check U against the parameters."""
        super().bind(model, parameters)
        if self.ranks.sharded:
            raise ValueError("geometry: FixedGeometry has no form for parameters of fully_shard")
        if isinstance(self.U, Tensor):
            n = sum(p.numel() for p in self.parameters.values())
            if tuple(self.U.shape) != (n, n):
                raise ValueError(
                    f"U: expected shape ({n}, {n}) for {n} parameter entries, "
                    f"got {tuple(self.U.shape)}"
                )
            _check_positive("U", self.U)
            return
        for name, u in self.U.items():
            if name not in self.parameters:
                raise ValueError(
                    f"U: the optimizer has no parameter {name!r}; it has {list(self.parameters)}"
                )
            parameter = self.parameters[name]
            n = parameter.numel()
            if u.dim() != 0 and u.shape != parameter.shape and tuple(u.shape) != (n, n):
                raise ValueError(
                    f"U[{name!r}]: expected a number, shape {tuple(parameter.shape)} or "
                    f"({n}, {n}), got {tuple(u.shape)}"
                )
            if self._elementwise(name):
                if not bool((u > 0).all()):
                    raise ValueError(f"U[{name!r}]: expected positive entries")
            else:
                _check_positive(f"U[{name!r}]", u)

    def _elementwise(self, name: str) -> bool:
        assert not isinstance(self.U, Tensor)
        return self.U[name].dim() == 0 or self.U[name].shape == self.parameters[name].shape

    def apply(self, gradients: Gradients) -> dict[str, Tensor]:
        """Return U g."""
        self._check(gradients)
        if isinstance(self.U, Tensor):
            like = next(iter(gradients.values()), None)
            if like is None:
                return {}
            flat = torch.cat(
                [
                    gradients[n].reshape(-1) if n in gradients else like.new_zeros(p.numel())
                    for n, p in self.parameters.items()
                ]
            )
            sizes = [p.numel() for p in self.parameters.values()]
            parts = torch.split(torch.mv(self.U.to(flat), flat), sizes)
            whole = dict(zip(self.parameters, parts, strict=True))
            return {n: whole[n].view_as(g) for n, g in gradients.items()}
        return {n: self._apply_one(n, g) for n, g in gradients.items()}

    def _apply_one(self, name: str, g: Tensor) -> Tensor:
        assert not isinstance(self.U, Tensor)
        if name not in self.U:
            return g.clone()
        u = self.U[name].to(g)
        return u * g if self._elementwise(name) else (u @ g.reshape(-1)).view_as(g)

    def spectrum(self) -> dict[str, tuple[float, float]]:
        """Return the extreme eigenvalues, of all parameters ("") or of each named one."""
        self._require_bound()
        if isinstance(self.U, Tensor):
            values = torch.linalg.eigvalsh(self.U)
            return {"": (float(values[0]), float(values[-1]))}
        result = {}
        for name, u in self.U.items():
            values = u if self._elementwise(name) else torch.linalg.eigvalsh(u)
            result[name] = (float(values.min()), float(values.max()))
        return result

    def numel(self) -> int:
        """Return the number of entries of U."""
        return sum(u.numel() for u in ([self.U] if isinstance(self.U, Tensor) else self.U.values()))


def _check_positive(label: str, matrix: Tensor) -> None:
    if not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-8):
        raise ValueError(f"{label}: expected a symmetric matrix")
    if int(torch.linalg.cholesky_ex(matrix).info) != 0:
        raise ValueError(f"{label}: expected a positive definite matrix")
