"""Jacobian-vector products of a forward whose operations have no double backward, and the check.

The chain: double backward with the swapped operations, plain double backward, forward-mode
differentiation, central differences. Double backward says when an operation lacks it, except
where a user's own autograd Function hides the dependence; such a graph is checked once against
differences.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .._module_state import RandomState
from ._swapped_ops import is_swapped

__all__ = ["MissingDerivative", "Rerun", "by_differences", "by_forward_mode", "foreign", "missing"]


class MissingDerivative(RuntimeError):
    """A derivative that came out wrong, because something hides a dependence."""


class Rerun:
    """A forward that can be run again as it ran first: same random numbers."""

    def __init__(self, forward: Callable[[], Any], parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device if parameters else None
        self._forward, self._device = forward, device
        self._random = RandomState(device)

    def __call__(self) -> Any:
        """Return what the forward returns."""
        now = RandomState(self._device)
        self._random.restore()
        try:
            return self._forward()
        finally:
            now.restore()


def by_forward_mode(
    outputs: Callable[[], list[Tensor]], parameters: Sequence[Tensor], d: Sequence[Tensor]
) -> list[Tensor]:
    """Return J d by one forward pass with dual numbers in the parameters' places."""
    with warnings.catch_warnings(), forward_ad.dual_level(), torch.no_grad():
        # At its first use torch compiles decompositions through an interface that it deprecates.
        warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
        make: Any = forward_ad.make_dual
        unpack: Any = forward_ad.unpack_dual
        duals = [make(p.detach(), v) for p, v in zip(parameters, d, strict=True)]
        with _Replaced(parameters, duals):
            zs = [unpack(z) for z in outputs()]
        return [torch.zeros_like(z.primal) if z.tangent is None else z.tangent.clone() for z in zs]


def by_differences(
    outputs: Callable[[], list[Tensor]], parameters: Sequence[Tensor], d: Sequence[Tensor]
) -> list[Tensor]:
    """Return (z(p + e d) - z(p - e d)) / 2e; the parameters come back bit for bit."""
    length = torch.stack([v.norm() for v in d]).norm()
    size = torch.stack([p.detach().norm() for p in parameters]).norm()
    eps = max(torch.finfo(p.dtype).eps for p in parameters)
    e = float(eps ** (1 / 3) * size.clamp(min=eps) / length.clamp(min=torch.finfo(d[0].dtype).tiny))
    with torch.no_grad():
        ends = []
        for sign in (e, -e):
            with _moved(parameters, d, sign):
                ends.append([z.detach().clone() for z in outputs()])
    return [(a - b) / (2 * e) for a, b in zip(*ends, strict=True)]


@contextmanager
def _moved(parameters: Sequence[Tensor], d: Sequence[Tensor], e: float) -> Iterator[None]:
    """Move the parameters for one forward, unseen by the graph that is kept.

    Through ``.data``, which counts no version: the graph is not used before they are back.
    """
    kept = [p.detach().clone() for p in parameters]
    try:
        for p, v in zip(parameters, d, strict=True):
            p.data.add_(v, alpha=e)
        yield
    finally:
        for p, value in zip(parameters, kept, strict=True):
            p.data.copy_(value)


class _Replaced(TorchFunctionMode):
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
        """Call ``func`` with the parameters replaced."""
        found = torch.utils._pytree.tree_map(self._value, (args, kwargs or {}))
        return func(*found[0], **found[1])

    def _value(self, x: Any) -> Any:
        return self._values.get(id(x), x) if isinstance(x, Tensor) else x


def foreign(tensors: Sequence[Tensor]) -> list[str]:
    """Return the names of users' autograd Functions in the graph above the parameters.

    Raises:
        ValueError: reentrant activation checkpointing, whose inner parameters no graph shows.
    """
    names: dict[str, None] = {}
    pending, seen = [t.grad_fn for t in tensors], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name == "CheckpointFunctionBackward":
            raise ValueError(
                "forward: reentrant activation checkpointing hides its parameters from the graph, "
                "and their curvature would silently be zero; call "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False"
            )
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not is_swapped(node):
            names[name.removesuffix("Backward")] = None
        pending.extend(parent for parent, _ in node.next_functions)
    return list(names)


def missing(error: BaseException) -> str | None:
    """Return the operation that an error says has no such derivative; None for other errors."""
    text = str(error)
    known = isinstance(error, (NotImplementedError, MissingDerivative))
    if not known and "once_differentiable" not in text:
        return None
    quoted = re.search(r"derivative for '?(?:aten::)?([\w.]+)'?|forward AD with (\w+)", text)
    if quoted is None:
        return text.partition(":")[0] if isinstance(error, MissingDerivative) else "an operation"
    return str(quoted.group(1) or quoted.group(2)).removeprefix("_").removesuffix("_backward")
