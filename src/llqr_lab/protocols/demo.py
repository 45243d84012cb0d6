"""The demo: what its runs have in common, and its own short names of methods and settings."""

from __future__ import annotations

from .own import LEARNED
from .settings import Group, Setting, Source

__all__ = ["DEMO", "DEMO_KEYS", "DEMO_METHODS"]

SCALE = Source.SCALE

# the name that the demo shows and its settings file has -> the method
DEMO_METHODS = {
    "SGDM": "SGDM",
    "AdamW": "AdamW",
    "LLQR": "LLQR (NGD)",
    "SAM": "SAM",
    "FriendlySAM": "F-SAM",
    "LLQR+SAM": "LLQR+SAM (NGD)",
    "LLQR+FriendlySAM": "LLQR+F-SAM (NGD)",
}
# the key of the demo's settings file -> the protocols' key
DEMO_KEYS = {
    "lr": "base.lr",
    "weight_decay": "base.weight_decay",
    "rho": "probe.rho",
    "decay": "probe.decay",
    "structure": "llqr.structure",
    "inner_lr": "llqr.lr",
    "ema": "llqr.ema",
    "every": "llqr.every",
    "graft": "optimizer.graft",
}

DEMO = Group(
    "The demo: digits with wrong labels",
    [
        *LEARNED,
        Setting("data.noise", 0.4, SCALE, "of the training labels are wrong, an exact share"),
        Setting("train.epochs", 30, SCALE),
        Setting("train.batch", 128, SCALE),
        Setting("refresh.batch", 256, SCALE),
        Setting("report.metric", "test accuracy after the last epoch", SCALE),
        Setting("report.seeds", (0, 1, 2), SCALE),
    ],
)
