"""What the steps of each method cost: all methods of a problem in turns, in one process."""

from __future__ import annotations

import math
import statistics
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import Method
from .problems import Problem, Size
from .training import Device, Training

__all__ = ["in_units", "measure_costs", "seconds_at", "steps_within"]

CHUNKS = 12
Cost = Mapping[str, Any]  # "steps" and the "seconds" that they took, both cumulative


def measure_costs(
    problem: Problem, size: Size, methods: Mapping[str, Method], device: Device, rounds: int = 1
) -> dict[str, Cost]:
    """Train with all methods side by side, a few steps of each in turns, and time them.

    A method's seconds per step change over a run where the gap between refreshes grows, so what is
    kept is the time of the first k steps, on a grid of k. The median of ``rounds`` runs counts for
    each piece of it. A method that fails has no steps, and an "error".
    """
    taken = {name: _Timed(problem, size, method, device) for name, method in methods.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for timed in taken.values():
                timed.begin()
            for steps in _pieces(size.steps):
                for timed in taken.values():
                    timed.advance(steps)
    return {name: timed.result() for name, timed in taken.items()}


def _pieces(steps: int) -> list[int]:
    marks = sorted({math.ceil(steps * i / CHUNKS) for i in range(CHUNKS + 1)})
    return [b - a for a, b in zip(marks, marks[1:])]  # noqa: B905


class _Timed:
    """The training of a method, timed piece by piece."""

    def __init__(self, problem: Problem, size: Size, method: Method, device: Device) -> None:
        rates = method.ranges(problem.rates, decay=problem.search_decay)
        self._settings = {name: found.start for name, found in rates.items()}
        self._parts = problem, size, method
        self._device = device
        self._rounds: list[list[float]] = []
        self._error: str | None = None

    def begin(self) -> None:
        problem, size, method = self._parts
        self._rounds.append([])
        self._attempt(lambda: self._make(problem, size, method))

    def _make(self, problem: Problem, size: Size, method: Method) -> None:
        steps, device = size.steps, self._device
        self._training = Training(problem, size, method, self._settings, 0, steps, device)

    def advance(self, steps: int) -> None:
        def take() -> None:
            began = self._device.seconds()
            for _ in range(steps):
                self._training.step()
            self._rounds[-1].append(self._device.seconds() - began)

        self._attempt(take)

    def _attempt(self, call: Any) -> None:
        if self._error is None:
            try:
                call()
            except Exception as error:  # a method that fails must not end a study of hours
                self._error = f"{type(error).__name__}: {error}"[:300]

    def result(self) -> Cost:
        if self._error is not None:
            return {"steps": [], "seconds": [], "error": self._error}
        pieces = [statistics.median(times) for times in zip(*self._rounds, strict=True)]
        lengths = _pieces(self._parts[1].steps)
        return {"steps": _sums(lengths), "seconds": [float(f"{s:.5g}") for s in _sums(pieces)]}


def _sums(values: Sequence[Any]) -> list[Any]:
    return [sum(values[: i + 1]) for i in range(len(values))]


def in_units(cost: Cost, factor: float) -> Cost:
    """Return a cost with its seconds times a factor."""
    return {**cost, "seconds": [float(f"{factor * s:.5g}") for s in cost["seconds"]]}


def seconds_at(cost: Cost, step: float) -> float:
    """Return the seconds of the first steps, in lines between the points that were measured.

    Beyond them the rate is that of the second half.

    Example:
        >>> cost = {"steps": [10, 20, 40], "seconds": [5.0, 6.0, 8.0]}
        >>> seconds_at(cost, 5), seconds_at(cost, 30), seconds_at(cost, 50)
        (2.5, 7.0, 9.0)
    """
    steps, seconds = [0, *cost["steps"]], [0.0, *cost["seconds"]]
    if step >= steps[-1]:
        half = (len(steps) - 1) // 2
        rate = (seconds[-1] - seconds[half]) / (steps[-1] - steps[half])
        return seconds[-1] + rate * (step - steps[-1])
    i = max(1, bisect_left(steps, step))
    share = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
    return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


def steps_within(cost: Cost, budget: float) -> int:
    """Return how many steps fit into a number of seconds, at least one.

    Example:
        >>> steps_within({"steps": [10, 20, 40], "seconds": [5.0, 6.0, 8.0]}, 9.0)
        50
    """
    low, high = 1, 2
    while seconds_at(cost, high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds_at(cost, middle) <= budget else (low, middle)
    return low
