"""Experiments of this project, small enough for a processor, on real data without internet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .scales import SMALL_TRANSLATOR
from .settings import METHODS, Group, Setting, Some, Source

__all__ = ["FASHION", "HELP_TEXTS", "LEARNED", "TUNED", "tuned_settings"]

SCALE = Source.SCALE
TUNED = Path(__file__).parent / "tuned"  # what the searches found, a file per experiment

LEARNED = [
    Setting("llqr.scale", "mean", SCALE, "llqr's default"),
    Setting("llqr.bases", "gradient", SCALE),
    Setting("llqr.constraint", "positive", SCALE, "llqr's default"),
    Setting("llqr.block_size", 512, SCALE, "llqr's default"),
    Setting("llqr.tolerance", 1e-2, SCALE, "llqr's default"),
    Setting("llqr.ema", 0.5, SCALE),
    Setting("optimizer.buffers", "clean", SCALE, "llqr's default"),
]

LEARNERS = Some("LLQR", ["LLQR (NGD)", "LLQR+SAM (NGD)"])
WITH_U = Some("methods with U", [*LEARNERS.names, "NG", "NG+SAM"])
# What the searches below leave alone: U has the library's defaults, at the recipe's cadence.
DEFAULTS = [
    *LEARNED,
    Setting("llqr.structure", "diagonal", SCALE, "llqr's default", method=LEARNERS),
    Setting("llqr.lr", "auto", SCALE, "llqr's default"),
    Setting("llqr.bases", "learned", SCALE, "llqr's default"),
    Setting("llqr.batch_norm", "batch", SCALE, "llqr's default"),
    Setting("optimizer.graft", True, SCALE, "base.lr keeps its scale", method=WITH_U),
]

FASHION = Group(
    "Fashion-MNIST",
    [
        *DEFAULTS,
        Setting("data.limit", 6000, SCALE, "training images, and as many of the test set"),
        Setting("data.crop", "none", SCALE),
        Setting("data.padding", 0, SCALE),
        Setting("data.flip", False, SCALE),
        Setting("data.cutout", False, SCALE),
        Setting("data.cutout_side", 0, SCALE),
        Setting("model.stages", ((8,), (16,), (32, 32)), SCALE, "15,642 parameters"),
        Setting("train.epochs", 8, SCALE),
        Setting("train.batch", 64, SCALE),
        Setting("llqr.every", 50, SCALE),
        Setting("refresh.batch", 256, SCALE),
        Setting("probe.rho", 0.1, SCALE),
        Setting("report.metric", "test accuracy after the last epoch", SCALE),
        Setting("report.seeds", (0, 1, 2, 3, 4), SCALE),
    ],
)

HELP_TEXTS = Group(
    "Help texts, German to English",
    [
        *DEFAULTS,
        Setting("data.limit", 4000, SCALE, "training pairs, and a tenth as many to validate"),
        Setting("data.bpe", 2000, SCALE),
        *SMALL_TRANSLATOR,
        Setting("train.tokens", 2048, SCALE),
        Setting("train.epochs", 4, SCALE),
        Setting("train.warmup_steps", 100, SCALE),
        Setting("llqr.every", 50, SCALE),
        Setting("refresh.batch", 64, SCALE),
        Setting("report.beam", 1, SCALE),
        Setting("report.metric", "BLEU after the last epoch", SCALE),
        Setting("report.seeds", (0, 1, 2), SCALE),
    ],
)


def tuned_settings(
    experiment: str,
    names: Mapping[str, Sequence[str]] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Iterator[Setting]:
    """Yield what the search of an experiment found, if there was one.

    Args:
        experiment: its name.
        names: the methods of :data:`METHODS` that take what the file has of a method; None or one
            that is not there: the method itself.
        keys: of the settings, from the file's to the protocols'; None: they are the same.
    """
    path = TUNED / f"{experiment}.json"
    if path.exists():
        for name, found in json.loads(path.read_text())["methods"].items():
            methods = [name] if names is None else names.get(name, [name])
            assert set(methods) <= set(METHODS)
            for key, value in found["settings"].items():
                dotted = keys[key] if keys else key
                some = Some(", ".join(methods), methods)
                yield Setting(dotted, value, Source.TUNED, method=some)
