"""The demo's runs: one method, one seed, by the same way as every recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig

import llqr

from ..protocols import DEMO_KEYS, DEMO_METHODS, resolve_settings, slug
from ..protocols.own import TUNED
from ..recipes.config import compose_config, resolve_config

__all__ = [
    "BATCH",
    "DemoRun",
    "EPOCHS",
    "History",
    "NOISE",
    "SETTINGS_FILE",
    "configure_run",
    "run_demo",
]

SETTINGS_FILE = TUNED / "demo.json"
_PROTOCOL = resolve_settings("demo", "digits", "small-cnn", "SGDM")
EPOCHS, BATCH, NOISE = (
    _PROTOCOL[key].value for key in ("train.epochs", "train.batch", "data.noise")
)
RefreshHook = Callable[[llqr.Optimizer, llqr.RefreshReport], None]


@dataclass(frozen=True)
class DemoRun:
    """One run: a method at settings, a seed, how long, and what it is evaluated on.

    Attributes:
        method: a key of ``DEMO_METHODS``.
        settings: by the keys of the demo's settings file; those that the method has no use for are
            left out.
        seed: of noise, weights, batches and refresh minibatches.
        epochs: passes over the training data.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    epochs: int = EPOCHS


@dataclass
class History:
    """What a run leaves behind.

    Attributes:
        loss: mean training loss of each epoch (clean passes, before the step).
        seconds: the processor's, of steps and refreshes from the start to the end of each epoch.
        steps: the same in steps.
        test_accuracy: after each epoch, in percent.
        train_accuracy: of the last epoch's network on the labels it was trained on, in percent.
        reports: of every refresh.
        skipped_steps: steps whose gradients were not finite.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    train_accuracy: float = float("nan")
    reports: list[llqr.RefreshReport] = field(default_factory=list)
    skipped_steps: int = 0


def configure_run(run: DemoRun) -> DictConfig:
    """Return the configuration of a run, as ``llqr run demo`` would make it.

    Raises:
        ValueError: a setting is unknown.
    """
    method = DEMO_METHODS[run.method]
    protocol = resolve_settings("demo", "digits", "small-cnn", method)
    if unknown := set(run.settings) - set(DEMO_KEYS):
        raise ValueError(f"settings: {run.method} has unknown {', '.join(sorted(unknown))}")
    settings = {DEMO_KEYS[key]: value for key, value in run.settings.items()}
    # The file may have settings that this method has no use for (rho of SGDM).
    overrides = [f"{key}={value}" for key, value in settings.items() if key in protocol]
    overrides += [f"method={slug(method)}", f"seed={run.seed}", f"train.epochs={run.epochs}"]
    return resolve_config(compose_config("demo", overrides))


def run_demo(run: DemoRun) -> History:
    """Train the small CNN on the noisy digits.

    Runs with the same seed see the same noise, the same initial weights, the same batches and, if
    they refresh equally often, the same refresh minibatches.
    """
    history = History()
    _warm_up(run.method)
    measured = _measure(
        configure_run(run), lambda optimizer, report: history.reports.append(report)
    )
    epochs = measured["epochs"]
    history.loss = [epoch["train_loss"] for epoch in epochs]
    history.seconds = [epoch["processor_seconds"] for epoch in epochs]
    history.steps = [epoch["step"] for epoch in epochs]
    history.test_accuracy = [epoch["test_accuracy"] for epoch in epochs]
    history.train_accuracy = measured["train_accuracy"]
    history.skipped_steps = measured["skipped_steps"]
    return history


@cache
def _warm_up(method: str) -> None:
    """Train an epoch, once per process: what torch loads at its first use is no cost of a run."""
    _measure(configure_run(DemoRun(method, {}, seed=0, epochs=1)), lambda optimizer, report: None)


def _measure(config: DictConfig, note_refresh: RefreshHook) -> dict[str, Any]:
    from ..recipes.records import Records
    from ..recipes.run import describe_run, measure_run
    from ..recipes.workers import Workers

    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # U g has the length of g here (graft=True), so it does not matter how large U is.
        warnings.filterwarnings("ignore", r"J\(U\) = .* is positive")
        return measure_run(config, Workers("cpu"), Records(), describe_run(config), note_refresh)
