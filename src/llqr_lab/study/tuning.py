"""The search of a method's settings: by optuna, with ranges that widen until the best is inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .methods import Range

__all__ = ["WIDER", "ends_of", "search"]

WIDER = 3.0  # a range whose end is best grows by this factor
MARGIN = 0.15  # share of a range, in logarithms, that counts as its end
WORST = -1e9  # of a run that failed: the sampler keeps away from it


def search(
    ranges: Mapping[str, Range],
    runs: int,
    score: Callable[[dict[str, float]], float | None],
    seed: int,
) -> dict[str, Any]:
    """Return the best settings, what was tried, and the settings that end at an end of their range.

    The first run is in the middle of the ranges. When the best so far lies at an end, the range
    grows there and the next run is beyond it: part of the same number of runs, so that no method
    has more than another.

    Args:
        ranges: where each setting is searched.
        runs: how many settings are tried; 0: the middle of the ranges is taken as it is.
        score: of settings, the higher the better; None: they failed.
        seed: of the sampler.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, runs // 2))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    bounds = {name: (r.low, r.high) for name, r in ranges.items()}
    study.enqueue_trial({name: r.start for name, r in ranges.items()})
    trials: list[dict[str, Any]] = []
    for _ in range(runs):
        trial = study.ask()
        settings = {
            name: float(f"{trial.suggest_float(name, *pair, log=True):.3g}")
            for name, pair in bounds.items()
        }
        found = score(settings)
        trials.append({"settings": settings, "score": found})
        study.tell(trial, WORST if found is None else found)
        best = _best_of(trials, settings)
        beyond = dict(best)
        for name, direction in ends_of(best, bounds).items():
            low, high = bounds[name]
            bounds[name] = (low / WIDER, high) if direction < 0 else (low, high * WIDER)
            beyond[name] = best[name] * WIDER**direction
        if beyond != best:
            study.enqueue_trial(beyond)
    best = _best_of(trials, {name: r.start for name, r in ranges.items()})
    return {
        "settings": best,
        "ends": sorted(ends_of(best, bounds)),
        "ranges": {name: list(pair) for name, pair in bounds.items()},
        "trials": trials,
    }


def _best_of(trials: list[dict[str, Any]], default: dict[str, float]) -> dict[str, float]:
    """Return the settings of the highest score."""
    found = [t for t in trials if t["score"] is not None]
    return dict(max(found, key=lambda t: t["score"])["settings"]) if found else default


def ends_of(
    settings: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, int]:
    """Return the settings that lie at an end: -1 at the lower, 1 at the upper.

    Example:
        >>> ends_of({"lr": 0.9, "rho": 0.1}, {"lr": (0.01, 1.0), "rho": (0.01, 1.0)})
        {'lr': 1}
    """
    found = {}
    for name, (low, high) in bounds.items():
        place = math.log(settings[name] / low) / math.log(high / low)
        if not MARGIN < place < 1 - MARGIN:
            found[name] = -1 if place < 0.5 else 1
    return found
