"""The demo's runs: one method, one seed, by the same way as every recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "REFRESH_BATCH",
    "SETTINGS_FILE",
    "configure_run",
    "run_demo",
]

SETTINGS_FILE = TUNED / "demo.json"
_PROTOCOL = resolve_settings("demo", "digits", "small-cnn", "LLQR+SAM (NGD)")
EPOCHS, BATCH, REFRESH_BATCH, NOISE = (
    _PROTOCOL[key].value for key in ("train.epochs", "train.batch", "refresh.batch", "data.noise")
)
Spectrum = dict[str, tuple[float, float]]


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
        test_accuracy: after each epoch, in percent.
        train_accuracy: of the last epoch's network on the labels it was trained on, in percent.
        reports: of every refresh.
        spectra: extreme eigenvalues of each layer's block of U after every refresh.
        skipped_steps: steps whose gradients were not finite.
        seconds: wall-clock time.
    """

    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    train_accuracy: float = float("nan")
    reports: list[llqr.RefreshReport] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    skipped_steps: int = 0
    seconds: float = 0.0


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
    from ..recipes.records import Records
    from ..recipes.run import describe_run, measure_run
    from ..recipes.workers import Workers

    history, began = History(), time.perf_counter()

    def note_refresh(optimizer: llqr.Optimizer, report: llqr.RefreshReport) -> None:
        assert optimizer.geometry is not None
        history.reports.append(report)
        history.spectra.append(optimizer.geometry.spectrum())

    config = configure_run(run)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        measured = measure_run(
            config, Workers("cpu"), Records(), describe_run(config), note_refresh
        )
    history.loss = [epoch["train_loss"] for epoch in measured["epochs"]]
    history.test_accuracy = [epoch["test_accuracy"] for epoch in measured["epochs"]]
    history.train_accuracy = measured["train_accuracy"]
    history.skipped_steps = measured["skipped_steps"]
    history.seconds = time.perf_counter() - began
    return history
