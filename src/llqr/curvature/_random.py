"""Random numbers that advance no generator of the caller's."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_normal"]


def random_normal(shape: torch.Size, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return normal numbers, the same at every call, on the CPU."""
    # The devices are named: torch.set_default_device may have made another one the default.
    noise = torch.Generator("cpu").manual_seed(seed)
    drawn_as = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=noise, dtype=drawn_as, device="cpu").to(dtype)
