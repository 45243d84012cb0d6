"""The methods that the lab compares, and how their settings become an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import llqr

__all__ = ["METHODS", "Method", "build"]


@dataclass(frozen=True)
class Method:
    """What a method is made of: a base optimizer, whether it learns U, and how it probes."""

    base: str
    geometry: bool = False
    perturbation: str | None = None


METHODS = {
    "SGDM": Method("sgd"),
    "AdamW": Method("adamw"),
    "LLQR": Method("sgd", geometry=True),
    "SAM": Method("sgd", perturbation="SAM"),
    "FriendlySAM": Method("sgd", perturbation="FriendlySAM"),
    "LLQR+SAM": Method("sgd", geometry=True, perturbation="SAM"),
    "LLQR+FriendlySAM": Method("sgd", geometry=True, perturbation="FriendlySAM"),
}


def build(name: str, model: nn.Module, settings: Mapping[str, Any]) -> llqr.Optimizer:
    """Return the optimizer of a method.

    Args:
        name: a key of ``METHODS``.
        model: the network.
        settings: lr and weight_decay of the base (SGD has momentum 0.9); rho of a probe, and decay
            of FriendlySAM's memory; structure, inner_lr, ema, every and graft of LLQR (e-kfac has
            gradient bases).
    """
    method = METHODS[name]
    base: torch.optim.Optimizer
    shared = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    if method.base == "adamw":
        base = torch.optim.AdamW(model.parameters(), **shared)
    else:
        base = torch.optim.SGD(model.parameters(), momentum=0.9, **shared)
    geometry, perturbation = None, None
    if method.geometry:
        geometry = llqr.LLQR(
            settings["structure"],
            lr=settings["inner_lr"],
            ema=settings["ema"],
            every=settings["every"],
            bases="gradient",
            max_failures=10**9,  # refusals are counted and shown, they do not end a run
        )
    if method.perturbation == "SAM":
        perturbation = llqr.SAM(settings["rho"])
    elif method.perturbation == "FriendlySAM":
        perturbation = llqr.FriendlySAM(settings["rho"], decay=settings["decay"])
    return llqr.Optimizer(
        base,
        model,
        geometry=geometry,
        perturbation=perturbation,
        graft=settings.get("graft", False),
    )
