"""Settings that may change with the optimizer step, and the ranges of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._checks import Schedule, check_number, value_at_step

__all__ = ["EMA", "EVERY", "INNER_LR", "ScheduledSetting"]


@dataclass(frozen=True)
class ScheduledSetting:
    """A setting that is a number or a function of the step, with values in [low, high).

    Attributes:
        name: of the argument, for messages.
        low: least value.
        high: bound of the values.
        open_low: whether ``low`` itself is excluded.
    """

    name: str
    low: float
    high: float = math.inf
    open_low: bool = False

    def check(self, value: Schedule) -> None:
        """Refuse a number out of range; a function is checked when it is called."""
        check_number(
            self.name,
            value,
            low=self.low,
            high=self.high,
            open_low=self.open_low,
            schedule=True,
        )

    def value_at(self, value: Schedule, step: int) -> float:
        """Return the number at an optimizer step.

        Raises:
            ValueError: it is out of range.
        """
        number = value_at_step(value, step)
        check_number(self.name, number, low=self.low, high=self.high, open_low=self.open_low)
        return number


#: Optimizer steps between refreshes; the inner learning rate; the EMA's beta.
EVERY = ScheduledSetting("every", low=1)
INNER_LR = ScheduledSetting("lr", low=0, open_low=True)
EMA = ScheduledSetting("ema", low=0, high=1)
