"""What changes where a run is made small: data that are at hand, small networks, short training."""

from __future__ import annotations

from .settings import Group, Setting, Source

__all__ = ["SCALES", "SMALL_CADENCE", "SMALL_IMAGES", "SMALL_TEXT", "SMALL_TRANSLATOR", "SMOKE"]

SCALES = ("paper", "small", "smoke")  # the largest first
SCALE = Source.SCALE

OWN = "that of the small network"
SMALL_TRANSLATOR = [
    Setting("model.small", True, SCALE),
    *(
        Setting(f"model.{size}", None, SCALE, OWN)
        for size in ("width", "hidden", "heads", "layers", "dropout")
    ),
]

SMALL_IMAGES = Group(
    "Small: digits instead of the images",
    [
        Setting("data.read", "digits", SCALE, "1,297 training and 500 test pictures, 8 x 8"),
        Setting("data.limit", None, SCALE, "all of them"),
        Setting("data.image", 8, SCALE),
        Setting("data.padding", 1, SCALE),
        Setting("data.crop", "random", SCALE),
        Setting("data.flip", False, SCALE, "mirrored digits are no digits"),
        Setting("data.cutout_side", 2, SCALE),
        Setting("model.small", True, SCALE),
        Setting("model.depth", None, SCALE, OWN),
        Setting("model.widen", None, SCALE, OWN),
        Setting("model.alpha", None, SCALE, OWN),
        Setting("train.epochs", 20, SCALE),
        Setting("train.batch", 64, SCALE),
        Setting("llqr.every", 50, SCALE),
        Setting("report.seeds", (0, 1, 2), SCALE),
    ],
)

SMALL_TEXT = Group(
    "Small: number words instead of IWSLT14",
    [
        Setting("data.read", "number-words", SCALE, "6,000 numbers below 100,000 to train on"),
        Setting("data.limit", None, SCALE, "all of them"),
        Setting("data.bpe", 200, SCALE),
        *SMALL_TRANSLATOR,
        Setting("train.tokens", 2048, SCALE),
        Setting("train.epochs", 12, SCALE),
        Setting("train.warmup_steps", 200, SCALE),
        Setting("base.lr", 3e-3, SCALE),
        Setting("llqr.every", 100, SCALE),
        Setting("refresh.batch", 64, SCALE),
        Setting("report.seeds", (0, 1, 2), SCALE),
    ],
)

SMALL_CADENCE = Group(
    "Small: vision transformers that a processor trains",
    [
        Setting("model.image", 32, SCALE),
        Setting("model.patch", 8, SCALE),
        Setting("model.classes", 10, SCALE),
        Setting("model.width", 32, SCALE, model=["vit-ti16"]),
        Setting("model.width", 64, SCALE, model=["vit-s16"]),
        Setting("model.width", 96, SCALE, model=["vit-b16"]),
        Setting("model.width", 128, SCALE, model=["vit-l16"]),
        Setting("model.depth", 2, SCALE),
        Setting("model.depth", 4, SCALE, model=["vit-l16"]),
        Setting("model.heads", 4, SCALE),
        Setting("train.batch", 16, SCALE),
        Setting("train.images", 640, SCALE),
        Setting("train.precision", "float32", SCALE),
        Setting("train.compile", False, SCALE),
        Setting("sweep.every", (5, 10, 20), SCALE),
        Setting("llqr.every", 10, SCALE),
        Setting("refresh.batch", 16, SCALE),
    ],
)

# It changes what one of the groups above or the protocol has.
SMOKE = Group(
    "Smoke: a few steps, to see that everything runs",
    [
        Setting("data.limit", 96, SCALE, "images of each part; training pairs"),
        Setting("train.epochs", 2, SCALE),
        Setting("train.batch", 32, SCALE),
        Setting("train.images", 96, SCALE),
        Setting("train.tokens", 512, SCALE),
        Setting("train.warmup_steps", 4, SCALE),
        Setting("probe.start", 0, SCALE),
        Setting("llqr.every", 2, SCALE),
        Setting("llqr.steps", 3, SCALE),
        Setting("refresh.batch", 16, SCALE),
        Setting("report.beam", 2, SCALE),
        Setting("report.seeds", (0,), SCALE),
    ],
)
