"""A metric that never changes: llqr.FixedGeometry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._vectors import Tensors
from ._base import Geometry

__all__ = ["FixedGeometry"]


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
        #: U where and as the gradients are: {(name, device, dtype): (original, converted)}.
        self._converted: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
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
            if self._is_elementwise(name):
                if not bool((u > 0).all()):
                    raise ValueError(f"U[{name!r}]: expected positive entries")
            else:
                _check_positive(f"U[{name!r}]", u)

    def _is_elementwise(self, name: str) -> bool:
        assert not isinstance(self.U, Tensor)
        return self.U[name].dim() == 0 or self.U[name].shape == self.parameters[name].shape

    def apply(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return U g."""
        self._check_gradients(gradients)
        if isinstance(self.U, Tensor):
            like = next(iter(gradients.values()), None)
            if like is None:
                return {}
            # One flat vector in model order: a full matrix couples all parameters.
            flat = torch.cat(
                [
                    gradients[n].reshape(-1) if n in gradients else like.new_zeros(p.numel())
                    for n, p in self.parameters.items()
                ]
            )
            sizes = [p.numel() for p in self.parameters.values()]
            # (n, n) @ (n,), and back to the parameters.
            parts = torch.split(torch.mv(self._convert("", self.U, flat), flat), sizes)
            whole = dict(zip(self.parameters, parts, strict=True))
            return {n: whole[n].view_as(g) for n, g in gradients.items()}
        return {n: self._apply_to_parameter(n, g) for n, g in gradients.items()}

    def _apply_to_parameter(self, name: str, g: Tensor) -> Tensor:
        assert not isinstance(self.U, Tensor)
        if name not in self.U:
            return g.clone()
        u = self._convert(name, self.U[name], g)
        return u * g if self._is_elementwise(name) else (u @ g.reshape(-1)).view_as(g)

    def _convert(self, name: str, u: Tensor, like: Tensor) -> Tensor:
        """Return U in the dtype and on the device of a gradient, converted once."""
        if (u.device, u.dtype) == (like.device, like.dtype):
            return u
        key = name, like.device, like.dtype
        original, converted = self._converted.get(key, (None, None))
        if original is not u or converted is None:
            converted = u.to(like)
            self._converted[key] = u, converted
        return converted

    def spectrum(self) -> dict[str, tuple[float, float]]:
        """Return the extreme eigenvalues, of all parameters ("") or of each named one."""
        self._require_bound()
        if isinstance(self.U, Tensor):
            values = torch.linalg.eigvalsh(self.U)
            return {"": (float(values[0]), float(values[-1]))}
        result = {}
        for name, u in self.U.items():
            values = u if self._is_elementwise(name) else torch.linalg.eigvalsh(u)
            result[name] = (float(values.min()), float(values.max()))
        return result

    def numel(self) -> int:
        """Return the number of entries of U."""
        return sum(u.numel() for u in ([self.U] if isinstance(self.U, Tensor) else self.U.values()))


def _check_positive(label: str, matrix: Tensor) -> None:
    if not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-8):
        raise ValueError(f"{label}: expected a symmetric matrix")
    # A Cholesky factor exists just if the matrix is positive definite.
    if int(torch.linalg.cholesky_ex(matrix).info) != 0:
        raise ValueError(f"{label}: expected a positive definite matrix")
