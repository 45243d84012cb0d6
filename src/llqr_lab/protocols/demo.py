"""The demo: what its runs have in common, and its own short names of methods and settings."""

from __future__ import annotations

from .own import LEARNED
from .settings import Group, Setting, Source, methods_where

__all__ = ["DEMO", "DEMO_KEYS", "DEMO_METHODS"]

SCALE = Source.SCALE

# the name that the demo shows and its settings file has -> the method
DEMO_METHODS = {
    "SGDM": "SGDM",
    "AdamW": "AdamW",
    "SAM": "SAM",
    "NG": "NG",
    "NG+SAM": "NG+SAM",
    "NG+SAM/5": "NG+SAM/5",
    "GM": "GM",
    "GM+SAM/5": "GM+SAM/5",
    "LLQR": "LLQR (NGD)",
    "LLQR+SAM": "LLQR+SAM (NGD)",
}
# the key of the demo's settings file -> the protocols' key
DEMO_KEYS = {
    "lr": "base.lr",
    "rho": "probe.rho",
    "structure": "llqr.structure",
    "inner_lr": "llqr.lr",
}
THROUGH_U = methods_where(
    "methods whose step goes through U",
    lambda name, m: name in DEMO_METHODS.values() and bool(m.metric) and m.transport is True,
)

DEMO = Group(
    "The demo: digits with wrong labels",
    [
        *LEARNED,
        Setting("llqr.every", 10, SCALE),
        Setting("optimizer.graft", True, SCALE, "base.lr keeps its scale", method=THROUGH_U),
        Setting("data.noise", 0.4, SCALE, "of the training labels are wrong, an exact share"),
        Setting("train.epochs", 15, SCALE),
        Setting("train.batch", 128, SCALE),
        Setting("refresh.batch", 128, SCALE),
        Setting("report.metric", "test accuracy after the last epoch", SCALE),
        Setting("report.seeds", (0, 1, 2), SCALE),
    ],
)
