"""The global random number generators, saved and put back."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

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
        self._numpy = None if "numpy.random" not in sys.modules else numpy_state()
        accelerators = {d for d in devices if d is not None and d.type not in ("cpu", "meta")}
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device) for device in accelerators
        }

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.restore()
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)


class NumpyState:
    """The state of numpy's global generator.

    To get or set it takes numpy 70 microseconds, as long as a small network's forward, and few
    trainings draw from it between two steps. So it is left alone while the words that its Mersenne
    Twister draws from, at the address that numpy tells, are still the same. A second number of a
    pair of normal ones that waits to be drawn is beside these words, and switches this off.
    """

    def __init__(self) -> None:
        numpy = sys.modules["numpy.random"]
        self._state: dict[str, Any] = numpy.get_state(legacy=False)
        words = read_words()
        # Numpy tells the address, but not what lies there: trust it if it is what was saved.
        trusted = words is not None and not self._state["has_gauss"]
        if trusted:
            saved = self._state["state"]
            position = int(saved["pos"]).to_bytes(4, sys.byteorder)
            trusted = words == saved["key"].astype("uint32").tobytes() + position
        self._words = words if trusted else None

    @property
    def current(self) -> bool:
        """Whether the generator is surely in this state now."""
        return self._words is not None and read_words() == self._words

    def restore(self) -> None:
        """Set the generator back."""
        if not self.current:
            sys.modules["numpy.random"].set_state(self._state)


#: The 624 words of a Mersenne Twister and the place in them, 4 bytes each.
TWISTER_BYTES = 4 * 625
_latest: NumpyState | None = None


def numpy_state() -> NumpyState:
    """Return the state of numpy's global generator, the latest again if it is still that."""
    global _latest
    latest = _latest
    if latest is None or not latest.current:
        latest = _latest = NumpyState()
    return latest


def read_words() -> bytes | None:
    """Return what numpy's global generator draws from, if that is a Mersenne Twister."""
    get = getattr(sys.modules["numpy.random"], "get_bit_generator", None)
    generator: Any = None if get is None else get()
    if type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, TWISTER_BYTES)
