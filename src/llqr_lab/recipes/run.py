"""One run of a recipe: what it is, where it is written, and making it."""

from __future__ import annotations

import datetime
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import llqr

from ..common.environment import describe_environment
from ..protocols import slug
from .cadence import KEYS as TIMING_KEYS
from .cadence import measure_cadence
from .config import changed_keys, chosen_names, flat_settings, resolve_config, source_of
from .digits import NoisyDigits
from .effects import refuse_keys_without_effect
from .images import Classification, FolderClassification
from .loop import Training
from .records import Records, kept_networks
from .task import Task
from .text import Translation
from .trackers import require_tracker
from .workers import Workers

__all__ = [
    "TIMINGS",
    "describe_run",
    "folder_of",
    "make_task",
    "measure_run",
    "perform_run",
    "task_keys",
]

#: Recipes that time steps and refreshes; the others train.
TIMINGS = ("table10", "figure6")
PACKAGED = ("digits", "number-words")  # data that need no folder
RefreshHook = Callable[[llqr.Optimizer, llqr.RefreshReport], None]


def folder_of(about: dict[str, Any], out: str) -> Path:
    """Return the folder of a run: its name says what it is, and differs for other settings."""
    # One folder each, also for timm/NAME.
    names = (slug(about[k]).replace("/", "-") for k in ("dataset", "model", "method"))
    name = f"seed{about['seed']}"
    if about["noise"]:
        name = f"noise{about['noise']:g}-{name}"
    # Runs with other settings never share a folder, nor a checkpoint.
    own = {key: about["settings"].get(key) for key in about["changed"]}
    if own:
        text = json.dumps(own, sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Path(out, about["recipe"], about["scale"], *names, name)


def perform_run(config: DictConfig) -> None:
    """Make one run, or resume it, unless it is finished."""
    workers = Workers(config.device)
    if workers.device.type == "cpu":
        torch.set_num_threads(config.threads)
    config = resolve_config(config)
    about = describe_run(config)
    refuse_keys_without_effect(config, task_keys(about))
    require_tracker(config.tracker)
    folder = folder_of(about, config.out)
    records = Records(folder, writes=workers.is_first, tracker=config.tracker)
    if (found := records.result) is not None and not config.force:
        if found["settings"] != about["settings"]:
            raise ValueError(
                f"out: {folder} holds a finished run with other settings; give another out=DIR, or "
                "force=true to replace it"
            )
        _say_once(workers, f"{folder}: finished before; force=true runs it again")
        return
    # Otherwise the new run would go on from the old one's checkpoint.
    if config.force and workers.is_first:
        for path in (
            folder / "result.json",
            folder / "checkpoint.pt",
            *kept_networks(folder).values(),
        ):
            path.unlink(missing_ok=True)
    try:
        measured = measure_run(config, workers, records, about)
        finished = datetime.datetime.now().isoformat(timespec="seconds")
        records.write_result(
            {
                **about,
                **measured,
                "environment": describe_environment(config.threads, workers.device),
                "finished": finished,
            }
        )
    finally:
        records.close()
    _say_once(workers, f"{folder / 'result.json'}: {_summary_line(measured)}")


def describe_run(config: DictConfig) -> dict[str, Any]:
    """Return what a run is: its names, seed and settings."""
    run = chosen_names(config)
    return {
        "recipe": config.recipe,
        "scale": config.scale,
        **{k: run[k] for k in ("dataset", "model", "method")},
        "source": source_of(config),
        "noise": config.noise,
        "seed": config.seed,
        "settings": flat_settings(config),
        "changed": changed_keys(config),
    }


def measure_run(
    config: DictConfig,
    workers: Workers,
    records: Records,
    about: dict[str, Any],
    on_refresh: RefreshHook | None = None,
) -> dict[str, Any]:
    """Return what a run measures.

    Args:
        config: resolved.
        workers: the processes.
        records: where it leaves its traces.
        about: what :func:`describe_run` says of it.
        on_refresh: is called after every refresh.
    """
    with warnings.catch_warnings():
        # Both are counted in the result.
        warnings.filterwarnings("ignore", "a refresh was refused")
        warnings.filterwarnings("ignore", "a step was skipped")
        if about["recipe"] in TIMINGS:
            records.begin_files(about)
            measured = measure_cadence(config, workers, on_refresh)
            timing = measured["timing"]
            records.write_measurement("timing", timing["steps"], timing)
            return measured
        training = Training(config, make_task(config, workers, about), workers, records)
        if on_refresh is not None:
            training.optimizer.register_refresh_hook(on_refresh)
        done = training.resume()
        if done:
            _say_once(workers, f"{records.folder}: goes on at step {done} of {training.steps}")
        records.begin_files(about, done, training.lines)
        return training.train_to_end()


def make_task(config: DictConfig, workers: Workers, about: dict[str, Any]) -> Task:
    """Return the data and the network of a run."""
    return _kind_of_task(about)(config, workers)


def task_keys(about: dict[str, Any]) -> frozenset[str]:
    """Return the keys of the configuration that a run's task reads."""
    if about["recipe"] in TIMINGS:
        return TIMING_KEYS
    keys = _kind_of_task(about).keys
    return keys - {"data"} if about["source"].lower() in PACKAGED else keys


def _kind_of_task(about: dict[str, Any]) -> type[Translation | NoisyDigits | Classification]:
    if about["model"] == "transformer-iwslt":
        return Translation
    if about["recipe"] == "demo":
        return NoisyDigits
    return FolderClassification if about["source"].lower() == "imagenet" else Classification


def _summary_line(measured: dict[str, Any]) -> str:
    if "timing" in measured:
        return f"{measured['timing']['epoch_seconds']:.1f} s an epoch"
    return (
        f"{measured['metric']} {measured['last']:.2f} (best {measured['best']:.2f}), "
        f"{measured['seconds']:.0f} s"
    )


def _say_once(workers: Workers, text: str) -> None:
    if workers.is_first:
        print(text, flush=True)
