"""What an operation must offer to be replaced, and small helpers of several operations.

No operation keeps a cotangent, as torch's own double backward would: the graph of J'u then holds
what the forward holds, in place of twice that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["LinearisedOperation", "Values", "are_plain", "has_subclass", "per_channel"]

Values = tuple[Tensor | None, ...]


class LinearisedOperation(ABC):
    """An operation at fixed inputs: its value, and its two linear maps.

    Attributes:
        tensors: the inputs that may carry gradients, with their graphs.
        value: the output, without a graph; of its form only, once it was handed over.
        written: what the call writes to besides.
    """

    tensors: Values
    value: Tensor
    written: Values = ()

    def hand_over_value(self) -> Tensor:
        """Return the value, and keep no more of it than shape and dtype: no map reads it."""
        value = self.value
        self.value = value.new_empty(()).expand_as(value)
        return value

    @abstractmethod
    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return J'g for each of ``tensors``; None where it is not ``needed``."""

    @abstractmethod
    def jvp(self, d: Values) -> Tensor | None:
        """Return J d for a tangent (or None, for zero) of each of ``tensors``."""


def are_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether all are strided tensors of one dtype, which no autocast changes."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return False
    return all(
        t is None or (t.dtype == x.dtype and t.layout == torch.strided and not t.is_nested)
        for t in (x, *others)
    )


def has_subclass(types: Iterable[type]) -> bool:
    """Tell whether a call's overloaded types hold a tensor subclass with functions of its own."""
    return any(t is not Tensor and t is not torch.nn.Parameter for t in types)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """Shape a vector of channels (dimension 1) to broadcast against ``like``."""
    return v.reshape(1, -1, *[1] * (like.dim() - 2))
