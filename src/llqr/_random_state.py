"""The global random number generators, saved and put back."""

from __future__ import annotations

import ctypes
import random
import sys
from array import array
from typing import Any

import torch

__all__ = ["RandomState"]


#: The 624 words of a Mersenne Twister and the place in them, 4 bytes each.
TWISTER_BYTES = 4 * 625
#: Bytes that are compared: the place, which each draw moves, and the 15 words beside it in memory,
#: all of which are others once 624 were drawn or another seed was set.
LOOKED = 4 * 16


class RandomState:
    """The global random number generators at one moment.

    Those of torch on the CPU and on the given accelerators, Python's and, if it is imported,
    numpy's. Generators that somebody holds are not among them.

    Args:
        devices: where torch draws numbers; None and the CPU add nothing.
    """

    def __init__(self, *devices: torch.device | None) -> None:
        self._cpu = torch.get_rng_state()
        self._twisters = [PYTHON.state()]
        if "numpy.random" in sys.modules:
            self._twisters.append(NUMPY.state())
        self._accelerators = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device is not None and device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for twister in self._twisters:
            twister.restore()
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)


class Twister:
    """A global Mersenne Twister outside of torch: Python's or numpy's.

    To get or set its state takes Python 12 microseconds and numpy 70, as long as a small network's
    forward, and few trainings draw from it between two steps. So it is left alone while what it
    draws from is still the same in memory. A second number of a pair of normal ones that waits to
    be drawn is beside these words, and switches this off.
    """

    def __init__(self) -> None:
        self._latest: TwisterState | None = None
        self._generator: Any = None
        self._words = (ctypes.c_char * 0)()

    def state(self) -> TwisterState:
        """Return the state, the latest again if it is still that."""
        latest = self._latest
        if latest is None or not latest.current:
            latest = self._latest = TwisterState(self)
        return latest

    def get_state(self) -> Any:
        """Return the state in the generator's own form."""
        raise NotImplementedError

    def set_state(self, state: Any) -> None:
        """Set the generator to a state."""
        raise NotImplementedError

    def words_of(self, state: Any) -> bytes | None:
        """Return what :meth:`read_words` should read in a state; None: a normal number waits."""
        raise NotImplementedError

    def find_generator(self) -> Any:
        """Return the generator, if its words tell its state and their address is known."""
        raise NotImplementedError

    def address_of(self, generator: Any) -> int:
        """Return where what is compared begins."""
        raise NotImplementedError

    def read_words(self) -> bytes | None:
        """Return what the generator draws from, if its memory is known."""
        generator = self.find_generator()
        if generator is None:
            return None
        if generator is not self._generator:
            self._generator = generator
            self._words = (ctypes.c_char * LOOKED).from_address(self.address_of(generator))
        return self._words.raw


class TwisterState:
    """The state of a generator at one moment.

    Args:
        twister: the generator.
    """

    def __init__(self, twister: Twister) -> None:
        self._twister, self._state = twister, twister.get_state()
        # Where the words lie is told, but not what lies there: trust it if it is what was saved.
        words, expected = twister.read_words(), twister.words_of(self._state)
        self._words = words if words is not None and words == expected else None

    @property
    def current(self) -> bool:
        """Whether the generator is surely in this state now."""
        return self._words is not None and self._twister.read_words() == self._words

    def restore(self) -> None:
        """Set the generator back."""
        if not self.current:
            self._twister.set_state(self._state)


#: Whether an address can be read, and Python's generator is long enough for its words.
PYTHON_KNOWN = (
    sys.implementation.name == "cpython"
    and random.Random.__basicsize__ >= object.__basicsize__ + TWISTER_BYTES
)


class PythonTwister(Twister):
    """That of the module ``random``: its place and its words follow the head of the object."""

    def get_state(self) -> Any:
        """Return the state in the generator's own form."""
        return random.getstate()

    def set_state(self, state: Any) -> None:
        """Set the generator to a state."""
        random.setstate(state)

    def words_of(self, state: Any) -> bytes | None:
        """Return what :meth:`read_words` should read in a state; None: a normal number waits."""
        _version, words, waiting = state
        # In memory the place comes first.
        return None if waiting is not None else array("I", [words[-1], *words[:15]]).tobytes()

    def find_generator(self) -> Any:
        """Return the generator, if no normal number waits and its address is known."""
        generator: Any = getattr(random, "_inst", None)
        known = PYTHON_KNOWN and type(generator) is random.Random
        return generator if known and generator.gauss_next is None else None

    def address_of(self, generator: Any) -> int:
        """Return where what is compared begins."""
        return id(generator) + object.__basicsize__


class NumpyTwister(Twister):
    """That of ``numpy.random``, whose address numpy tells."""

    def get_state(self) -> Any:
        """Return the state in the generator's own form."""
        return sys.modules["numpy.random"].get_state(legacy=False)

    def set_state(self, state: Any) -> None:
        """Set the generator to a state."""
        sys.modules["numpy.random"].set_state(state)

    def words_of(self, state: Any) -> bytes | None:
        """Return what :meth:`read_words` should read in a state; None: a normal number waits."""
        if state["has_gauss"] or state["bit_generator"] != "MT19937":
            return None
        place = int(state["state"]["pos"]).to_bytes(4, sys.byteorder)
        return bytes(state["state"]["key"][-15:].astype("uint32").tobytes() + place)

    def find_generator(self) -> Any:
        """Return the generator, if its address can be told."""
        get = getattr(sys.modules["numpy.random"], "get_bit_generator", None)
        generator: Any = None if get is None else get()
        return generator if type(generator).__name__ == "MT19937" else None

    def address_of(self, generator: Any) -> int:
        """Return where what is compared begins."""
        return int(generator.ctypes.state_address) + TWISTER_BYTES - LOOKED


PYTHON, NUMPY = PythonTwister(), NumpyTwister()
