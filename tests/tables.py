"""The rows of the generic tests: bases, structures, perturbations, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import llqr
from tiny import STRUCTURES, llqr_of, natural_of

Make = Callable[..., torch.optim.Optimizer]  # (parameters, **more options)
optim = torch.optim


def _of(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Make:
    return lambda parameters, **more: cls(parameters, **{**options, **more})


def muon(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """torch.optim.Muon; a test that asks for it is skipped where torch has none."""
    if not hasattr(optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    return optim.Muon(parameters, **options)


BASES: dict[str, Make] = {
    "SGD": _of(optim.SGD, lr=0.1),
    "SGD-momentum": _of(optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "SGD-nesterov": _of(optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "Adam": _of(optim.Adam, lr=0.01),
    "Adam-amsgrad": _of(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": _of(optim.AdamW, lr=0.01, weight_decay=0.1),
    "NAdam": _of(optim.NAdam, lr=0.01, momentum_decay=6e-3),
    "RAdam": _of(optim.RAdam, lr=0.01),
    "Adamax": _of(optim.Adamax, lr=0.01),
    "Adadelta": _of(optim.Adadelta, lr=1.0),
    "Adagrad": _of(optim.Adagrad, lr=0.1, lr_decay=0.1),
    "ASGD": _of(optim.ASGD, lr=0.1, t0=2),
    "RMSprop": _of(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "Rprop": _of(optim.Rprop, lr=0.01),
    "Adafactor": _of(optim.Adafactor, lr=0.01),
    "Muon": _of(muon, lr=0.01),
    "LBFGS": _of(optim.LBFGS, lr=0.1),
    "SparseAdam": _of(optim.SparseAdam, lr=0.01),
}
#: What minimises J at one gradient: several processes do what one does with the joined batch.
SOLVED: dict[str, Callable[[], llqr.Geometry | None]] = {
    "none": lambda: None,
    **{name: (lambda name=name: llqr_of(name)) for name in STRUCTURES},
    "e-kfac-gradient": lambda: llqr_of("e-kfac", bases="gradient", renew_every=2),
}
#: What draws samples: each process its own.
SAMPLED: dict[str, Callable[[], llqr.NaturalGradient]] = {
    "natural-e-kfac": lambda: natural_of("e-kfac", renew_every=2),
    "natural-gradients": lambda: natural_of("e-kfac", second_moment="gradients"),
}
#: What learns from the gradients of the steps.
FOLLOWING: dict[str, Callable[[], llqr.Geometry]] = {
    "moments-kfac": lambda: llqr.GradientMoments(renew_every=2, ema=0.5),
    "moments-e-kfac": lambda: llqr.GradientMoments("e-kfac", renew_every=2, ema=0.5),
}
GEOMETRIES: dict[str, Callable[[], llqr.Geometry | None]] = {**SOLVED, **SAMPLED, **FOLLOWING}
PERTURBATIONS: dict[str, Callable[[], llqr.Perturbation | None]] = {
    "none": lambda: None,
    "SAM": lambda: llqr.SAM(0.05),
    "ASAM": lambda: llqr.ASAM(0.5),
    "FisherSAM": lambda: llqr.FisherSAM(0.05),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.05),
    "LookSAM": lambda: llqr.LookSAM(0.05, interval=2),
    "GSAM": lambda: llqr.GSAM(0.05),
    "WSAM": lambda: llqr.WSAM(0.05, gamma=0.6),
    "ESAM": lambda: llqr.ESAM(0.05),
    "MSAM": lambda: llqr.MSAM(0.05),
}
LEFT_OUT = {
    "LBFGS": "refused by name: it evaluates the closure several times a step (see test_bad_input)",
    "SparseAdam": "refused by name: sparse gradients have no matrix view (see test_bad_input)",
}
MATRICES_ONLY = {"Muon"}
WITHOUT_MOMENTUM = {"SGD", "Adadelta", "Adagrad", "ASGD", "Rprop", "Adafactor"}
# Which steps they make does not depend on what U is made of, so they meet one U only.
SHORT_ROWS = {"LookSAM", "GSAM", "WSAM", "ESAM", "MSAM"}
# What torch.optim itself lacks for a base.
NO_FOREACH = {"Adafactor", "Muon", "LBFGS", "SparseAdam"}
FUSED = {"SGD", "SGD-momentum", "SGD-nesterov", "Adam", "Adam-amsgrad", "AdamW", "Adagrad"}
METRIC_AND_PROBE = [
    (g, p)
    for g in GEOMETRIES
    for p in PERTURBATIONS
    if (
        p in ("none", "SAM")
        if g in {**SAMPLED, **FOLLOWING}
        else p not in SHORT_ROWS or g == "diagonal"
    )
]
