"""Settings that may change with the optimizer step, and the ranges of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._checks import Schedule, check_number, value_at_step

__all__ = [
    "EMA",
    "EVERY",
    "EVERY_GROWING",
    "EVERY_GROWING_SPARSELY",
    "INNER_LR",
    "SOON",
    "ScheduledSetting",
    "back_off",
    "gap_after",
    "growing",
]

#: Optimizer steps that refusals lengthen a gap to, at most; and those of a saturated network, which
#: a few steps may lead out of its saturation (an attempt costs about as much as three of them).
LONGEST = 500
SOON = 50


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


@dataclass(frozen=True, repr=False)
class growing:  # lower case, as functools.partial: it is called like a function
    r"""Refresh often while the network changes fast, and rarely later.

    .. math:: \text{gap after a refresh at step } t = \min(\max(t / \text{rate},
        \text{first}), \text{last})

    The curvature moves most in the first steps. With rate 4, each gap is a quarter of the steps
    made so far, so that a run of T steps has about ``rate * log(T / (rate * first)) + rate``
    refreshes, however long it is, until the gap is ``last``.

    Args:
        first: least gap, in optimizer steps.
        last: largest gap.
        rate: steps made so far per step of the gap.

    Raises:
        ValueError: ``first`` below 1, ``last`` below ``first``, or ``rate`` not positive.

    Example:
        >>> import llqr
        >>> every = llqr.growing(5, 500)
        >>> every, [every(step) for step in (0, 100, 10_000)]
        (growing(5, 500), [5, 25.0, 500])
        >>> geometry = llqr.LLQR("kfac", every=every)
    """

    first: float
    last: float
    rate: float = 4

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        check_number("first", self.first, low=1)
        check_number("last", self.last, low=self.first)
        check_number("rate", self.rate, low=0, open_low=True)

    def __call__(self, step: int) -> float:
        """Return how many steps pass after a refresh at a step."""
        return min(max(step / self.rate, self.first), self.last)

    def __repr__(self) -> str:
        rate = "" if self.rate == 4 else f", rate={self.rate}"
        return f"growing({self.first}, {self.last}{rate})"


#: The default cadence of LLQR, and of NaturalGradient, whose refresh costs more.
EVERY_GROWING = growing(5, 500)
EVERY_GROWING_SPARSELY = growing(10, 500, rate=3)


def gap_after(every: Schedule, last: int, step: int) -> float:
    """Return how many steps must have passed at ``step`` since the refresh at step ``last``."""
    # A gap that grows is fixed by the refresh it follows: with every(step), rate=1 would never be
    # reached. Other functions are asked at the present step, so that a change acts at once.
    return EVERY.value_at(every, last if isinstance(every, growing) else step)


def back_off(every: Schedule, gap: float, failures: int, longest: float = LONGEST) -> float:
    """Return the gap after refusals in a row: each doubles it, up to a bound.

    What refused a refresh (a saturated network, an inner rate that is too large) may last; a
    refresh that is refused costs as much as one that is not.

    Args:
        every: steps between refreshes; the last gap of one that grows is a bound too.
        gap: without refusals.
        failures: refusals in a row.
        longest: the bound, if ``gap`` itself is not longer.
    """
    if isinstance(every, growing):
        longest = min(longest, every.last)
    return max(gap, min(gap * 2.0 ** min(failures, 16), longest))
