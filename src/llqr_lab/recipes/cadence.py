"""Wall-clock time of an epoch and of a refresh (table 10, figures 5 and 6); nothing is learned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

import llqr

from ..common.output import show_refreshes, step_bar
from .build import network_of, optimizer_of
from .digest import describe_data
from .draws import generator_for
from .workers import Workers

__all__ = ["KEYS", "measure_cadence"]

# what a timing reads of the configuration, besides the optimizer's keys
KEYS = frozenset(
    {f"train.{key}" for key in ("epochs", "batch", "images", "precision", "compile")}
    | {"network.classes", "network.image", "refresh.batch"}
)


def measure_cadence(
    config: DictConfig,
    workers: Workers,
    on_refresh: Callable[[llqr.Optimizer, llqr.RefreshReport], None] | None = None,
) -> dict[str, Any]:
    """Time every step and every refresh of the epochs on random pictures.

    Two steps go before, with the compilation in them. The first refresh is timed apart: it can
    take longer than the later ones.

    Args:
        config: of the run.
        workers: the processes.
        on_refresh: is called after every refresh.

    Returns:
        ``timing``: seconds per epoch as measured, and without what the first refresh took above the
        median of the later ones (or in all, if it is the only one); medians of a step and of a
        later refresh.
    """
    network = network_of(config, workers.device, config.network.classes)
    model = workers.wrap_model(network)
    optimizer = optimizer_of(config, model)
    if on_refresh is not None:
        optimizer.register_refresh_hook(on_refresh)
    compiled = torch.compile(model) if config.train.compile else model
    mixed = torch.autocast(
        workers.device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16"
    )
    x, y = _random_pictures(config, workers, config.train.batch, "pictures")
    refresh_x, refresh_y = _random_pictures(config, workers, config.refresh.batch or 1, "refresh")

    def forward_step() -> tuple[Tensor, Tensor]:
        with mixed:
            logits = compiled(x)
            return F.cross_entropy(logits, y), logits

    def forward_refresh() -> tuple[Tensor, Tensor]:
        # As in training: in the parameters' own precision, and not compiled.
        logits = model(refresh_x)
        return F.cross_entropy(logits, refresh_y), logits

    for _ in range(2):  # the warm-up; it refreshes nothing
        for _ in optimizer.passes():
            forward_step()[0].backward()
    optimizer.zero_grad()
    workers.synchronize()
    steps = -(-config.train.images // config.train.batch)
    total = config.train.epochs * steps
    times: list[float] = []
    refreshes: list[float] = []
    with step_bar(total, 0, config.model, silent=not workers.is_first) as bar:
        show_refreshes(bar, optimizer.geometry)
        # Each time ends with a wait for the device, whose work is asynchronous.
        for _ in range(total):
            if optimizer.refresh_due:
                began = time.perf_counter()
                optimizer.refresh(forward_refresh)
                workers.synchronize()
                refreshes.append(time.perf_counter() - began)
            began = time.perf_counter()
            optimizer.minimize(forward_step)
            workers.synchronize()
            times.append(time.perf_counter() - began)
            bar.update()
    return _summarise_times(config, times, refreshes, steps) | {
        "refreshes": [],
        "skipped_steps": optimizer.skipped_steps,
        "parameters": sum(p.numel() for p in network.parameters()),
        "processes": workers.size,
        "data": describe_data(f"random pictures, {config.network.image} pixels"),
        "seconds": sum(times) + sum(refreshes),
    }


def _random_pictures(
    config: DictConfig, workers: Workers, count: int, purpose: str
) -> tuple[Tensor, Tensor]:
    """Return this process's part of a batch of pictures and labels."""
    draws = generator_for(config.seed, purpose, workers.rank)
    side = config.network.image
    x = torch.randn(count // workers.size, 3, side, side, generator=draws)
    y = torch.randint(config.network.classes, (len(x),), generator=draws)
    return x.to(workers.device), y.to(workers.device)


def _summarise_times(
    config: DictConfig, times: list[float], refreshes: list[float], steps: int
) -> dict[str, Any]:
    epochs = config.train.epochs
    # The paper leaves out what only the first refresh costs (allocation, kernel choice).
    measured = (sum(times) + sum(refreshes)) / epochs
    later = statistics.median(refreshes[1:]) if len(refreshes) > 1 else None
    excess = refreshes[0] - (later or 0.0) if refreshes else 0.0
    return {
        "metric": "epoch_seconds",
        "timing": {
            "every": config.llqr.every if refreshes else None,
            "steps": len(times),
            "steps_an_epoch": steps,
            "step_seconds": statistics.median(times),
            "first_refresh_seconds": refreshes[0] if refreshes else None,
            "update_seconds": later,
            "updates": len(refreshes),
            "epoch_seconds": measured,
            "epoch_seconds_without": measured - excess / epochs,
        },
    }
