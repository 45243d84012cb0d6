"""What devices can do: how wide their numbers are, and tensors that lie on several of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "SHORT",
    "WIDE",
    "compute_per_device",
    "flatten",
    "join_short",
    "reads_are_free",
    "split_by_device",
    "unflatten",
    "widen",
    "widest_dtype",
]

V = TypeVar("V")
R = TypeVar("R")

#: Entries of a tensor up to which its call costs more than its numbers, and float64 nothing.
SHORT = 2**14
#: The dtypes in which gradients are taken as they are.
WIDE = frozenset({torch.float32, torch.float64})


def reads_are_free(devices: Collection[torch.device]) -> bool:
    """Tell whether numbers on some devices can be read at once, without waiting for work there.

    If there are several, sums over all of them need a read anyway.
    """
    return len(devices) > 1 or all(device.type == "cpu" for device in devices)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which long sums are taken: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in the widest dtype of its device."""
    return tensor.to(widest_dtype(tensor.device))


def flatten(tensors: list[Tensor]) -> Tensor:
    """Return the entries of tensors on one device, one behind the other.

    In one call for all; a tensor that is alone shares its memory with the result.
    """
    return torch._C._nn.flatten_dense_tensors(tensors)


def join_short(tensors: list[Tensor]) -> list[Tensor]:
    """Return the long tensors as they are, and all short ones of that device as one."""
    short = [t for t in tensors if t.numel() <= SHORT]
    return [t for t in tensors if t.numel() > SHORT] + ([flatten(short)] if short else [])


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the parts of a flat tensor that :func:`flatten` made of others, in their shapes."""
    if all(map(Tensor.numel, like)):
        return list(torch._C._nn.unflatten_dense_tensors(flat, like))
    # Of tensors without entries torch forgets the shape.
    parts = torch.split(flat, list(map(Tensor.numel, like)))
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def split_by_device(
    values: Mapping[str, V], tensor_of: Callable[[V], Tensor]
) -> list[dict[str, V]]:
    """Return the entries of each device together, in their order.

    Args:
        values: {name: value}.
        tensor_of: the tensor of a value that says where it is.
    """
    groups: dict[torch.device, dict[str, V]] = {}
    for name, value in values.items():
        groups.setdefault(tensor_of(value).device, {})[name] = value
    return list(groups.values())


def compute_per_device(
    compute: Callable[[Mapping[str, V]], R],
    values: Mapping[str, V],
    tensor_of: Callable[[V], Tensor],
) -> list[R]:
    """Return the result of all entries at once or, if they lie on several devices, of each.

    Args:
        compute: changes nothing, and raises a RuntimeError if tensors of two devices meet.
        values: {name: value}.
        tensor_of: the tensor of a value that says where it is.
    """
    try:
        return [compute(values)]
    except RuntimeError:
        # Asked only now, since this runs in every step, mostly on one device.
        parts = split_by_device(values, tensor_of)
        if len(parts) < 2:
            raise
    return [compute(part) for part in parts]
