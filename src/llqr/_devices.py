"""What devices can do: how wide their numbers are, and tensors that lie on several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["split_by_device", "widen", "widest_dtype"]

V = TypeVar("V")


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which long sums are taken: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in the widest dtype of its device."""
    return tensor.to(widest_dtype(tensor.device))


def split_by_device(
    values: Mapping[str, V], tensor_of: Callable[[V], Tensor]
) -> list[Mapping[str, V]]:
    """Return the entries of each device together; of one device, the mapping itself.

    Args:
        values: {name: value}.
        tensor_of: the tensor of a value that says where it is.
    """
    devices = [tensor_of(value).device for value in values.values()]
    if len(set(devices)) < 2:
        return [values]
    groups: dict[torch.device, dict[str, V]] = {}
    for (name, value), device in zip(values.items(), devices, strict=True):
        groups.setdefault(device, {})[name] = value
    return list(groups.values())
