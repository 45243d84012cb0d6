"""Where a training stands: the counters and warnings that the parts of an optimizer share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ._warnings import warn_caller

__all__ = ["Progress"]


@dataclass
class Progress:
    """The counters of one optimizer, changed in place by its parts.

    Lightning and Fabric wrap an optimizer in objects that read its attributes but keep what is
    assigned to them; an object that is changed in place is the same for both.

    Attributes:
        step: how many steps counted.
        skipped_steps: how many were skipped, since their gradients were not finite.
        skipped_probes: how many second passes ran unperturbed, since U gave no positive norm;
            a tensor if some were counted on a device.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_probes: int | Tensor = 0
    _warned: set[str] = field(default_factory=set, repr=False)

    def warn_once(self, message: str) -> None:
        """Warn, unless the same was said before."""
        key = message[:40]
        if key not in self._warned:
            self._warned.add(key)
            warn_caller(message)

    def counters(self) -> dict[str, int]:
        """Return the numbers, to checkpoint."""
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_probes": int(self.skipped_probes),
        }

    def load_counters(self, counters: dict[str, int]) -> None:
        """Take over what :meth:`counters` returned."""
        self.step = int(counters["step"])
        self.skipped_steps = int(counters["skipped_steps"])
        self.skipped_probes = int(counters["skipped_probes"])
