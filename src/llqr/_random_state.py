"""The global random number generators, saved and put back."""

from __future__ import annotations

import random
import sys

import torch

__all__ = ["RandomState"]


class RandomState:
    """The global random number generators at one moment.

    Those of torch on the CPU and on the given accelerators, Python's and, if it is imported,
    numpy's. Generators that somebody holds are not among them.

    Args:
        devices: where torch draws numbers; None and the CPU add nothing.
    """

    def __init__(self, *devices: torch.device | None) -> None:
        self._cpu = torch.get_rng_state()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else numpy.get_state(legacy=False)
        accelerators = {d for d in devices if d is not None and d.type not in ("cpu", "meta")}
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device) for device in accelerators
        }

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)
