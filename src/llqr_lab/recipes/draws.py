"""A generator of its own for each purpose and moment: nothing about a run's past is needed.

The numbers that are drawn for step k depend only on the seed, the purpose and k. So all methods of
a seed see the same batches, pictures and masks, and a run that is resumed draws what it would have.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator_for", "seed_of"]


def seed_of(seed: int, purpose: str, *moment: int) -> int:
    """Return a 63-bit number that differs for every argument.

    Example:
        >>> seed_of(0, "order", 1) == seed_of(0, "order", 1)
        True
        >>> seed_of(0, "order", 1) == seed_of(0, "order", 2)
        False
    """
    text = "/".join(map(str, (seed, purpose, *moment)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(
    seed: int, purpose: str, *moment: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a generator for one purpose, at one moment (a step, an epoch)."""
    return torch.Generator(device).manual_seed(seed_of(seed, purpose, *moment))
