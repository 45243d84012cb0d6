"""The network, the optimizer and the schedule that a run's settings describe."""

from __future__ import annotations

import math
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

import llqr

from ..models.registry import build_network
from ..protocols import METHODS
from .config import chosen_names, given_values
from .draws import seed_of

__all__ = ["network_of", "optimizer_of", "schedule_of"]


def network_of(
    config: DictConfig,
    device: torch.device,
    classes: int,
    *,
    weights_seed: int | None = None,
    **settings: Any,
) -> nn.Module:
    """Return the run's network; its weights depend only on the seed.

    Args:
        config: of the run.
        device: where it is.
        classes: number of classes, or size of the target vocabulary.
        weights_seed: of the initial weights; None: drawn from the seed of the run.
        **settings: what the data say of it, beside the group ``network``.
    """
    if weights_seed is None:
        weights_seed = seed_of(config.seed, "initialisation")
    torch.manual_seed(weights_seed)
    own = given_values(config.network, "small", "classes")
    small = bool(config.network.small)
    return build_network(config.model.lower(), classes, small=small, **settings, **own).to(device)


def optimizer_of(config: DictConfig, model: nn.Module) -> llqr.Optimizer:
    """Return the run's method: a base optimizer, with or without geometry and probe.

    Refused refreshes are counted and reported; they do not end a run.
    """
    base = getattr(torch.optim, config.base.optimizer)
    probe = None
    if config.probe.kind is not None:
        probe = getattr(llqr, config.probe.kind)(**given_values(config.probe, "kind"))
    return llqr.Optimizer(
        base(model.parameters(), **given_values(config.base, "optimizer")),
        model,
        geometry=_geometry_of(config),
        perturbation=probe,
        **given_values(config.optimizer),
    )


def _geometry_of(config: DictConfig) -> llqr.Geometry | None:
    method = METHODS[chosen_names(config)["method"]]
    if method.metric is None:
        return None
    # Every setting of LLQR has a value, some of them None; of others what is None is the default.
    settings: Any = OmegaConf.to_container(config.llqr, resolve=True)
    if method.metric != "LLQR":
        settings = given_values(config.llqr)
    if method.curvature is not None:
        # A metric stops after some refusals in a row; here they are results.
        settings["max_failures"] = 10**9
    return getattr(llqr, method.metric)(**settings)


def schedule_of(
    config: DictConfig, optimizer: llqr.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the learning rate's schedule over a number of steps.

    "cosine" falls from base.lr to train.final_lr; "inverse square root" rises in a line over
    train.warmup_steps to base.lr and then falls as 1 / sqrt(step); "constant" stays.

    Raises:
        ValueError: there is no such schedule.
    """
    kind = config.train.schedule
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=steps, eta_min=config.train.final_lr
        )
    if kind == "inverse square root":
        # Both branches are 1 at k + 1 = warm: base.lr is the peak (fairseq's inverse_sqrt).
        warm = config.train.warmup_steps
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / warm, math.sqrt(warm / (k + 1)))
        )
    if kind == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    raise ValueError(
        f"train.schedule: expected cosine, inverse square root or constant, got {kind!r}"
    )
