"""The network of a run, trained, with the data that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from ..common.vision import is_packaged
from ..protocols import slug
from .config import GROUPS, compose_config, resolve_config
from .run import make_task
from .task import Task
from .workers import Workers

__all__ = ["config_of_run", "load_trained", "training_data"]


def config_of_run(about: dict[str, Any], data: str | None, device: str) -> DictConfig:
    """Return the configuration that a run had.

    Args:
        about: what its ``config.json`` says.
        data: the folder of the data, which is not written down there.
        device: where to compute.
    """
    chosen = {k: slug(about[k]) for k in ("dataset", "model", "method")}
    if is_packaged(about["model"]):  # timm/NAME is typed as it is
        chosen["model"] = about["model"]
    chosen |= {k: about[k] for k in ("scale", "seed", "noise")}
    config = resolve_config(
        compose_config(about["recipe"], [f"{k}={v}" for k, v in chosen.items()])
    )
    groups = {word: group for group, word in GROUPS.items()}
    for key, value in about["settings"].items():
        word, _, name = key.partition(".")
        # Settings of earlier versions that had no effect are gone.
        added = word == "model" and is_packaged(about["model"])  # +network.KEY
        if name and (added or name in config[groups[word]]):
            with open_dict(config):
                config[groups[word]][name] = value
    config.read, config.data, config.device = about["settings"]["read"], data, device
    return config


def load_trained(folder: Path, data: str | None = None, device: str = "auto") -> tuple[Any, Task]:
    """Return what a run says of itself, and its task with the trained network.

    Args:
        folder: of the run, with ``config.json`` and ``network.pt`` or ``checkpoint.pt``.
        data: the folder of the data, if the run had one.
        device: "auto", or what torch takes.

    Raises:
        ValueError: there is no such run, or no network in it.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: there is no run here; give a folder that has a config.json")
    about = json.loads((folder / "config.json").read_text())
    workers = Workers(device)
    network, checkpoint = folder / "network.pt", folder / "checkpoint.pt"
    if not (network.exists() or checkpoint.exists()):
        raise ValueError(f"{folder}: neither network.pt nor checkpoint.pt is here, so no weights")
    task = make_task(config_of_run(about, data, device), workers, about)
    state = torch.load(
        network if network.exists() else checkpoint, map_location=workers.device, weights_only=True
    )
    task.network.load_state_dict(state if network.exists() else state["network"])
    return about, task


def training_data(task: Task, count: int) -> tuple[Callable[[Any], Any], list[tuple[int, Any]]]:
    """Return the pass of a numbered training batch, in evaluation mode, and the first of these."""
    task.network.eval()

    def forward(numbered: tuple[int, Any]) -> Any:
        step, batch = numbered
        return task.forward(task.network, batch, step)()

    return forward, list(enumerate(islice(task.batches(0, 0), count)))
