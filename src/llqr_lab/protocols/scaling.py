"""Settings of the wall-clock measurements on vision transformers (table 10, figures 5 and 6)."""

from __future__ import annotations

from .settings import Group, Setting, Source, methods_where

__all__ = ["CADENCE"]

PAPER, ASSUMED = Source.PAPER, Source.ASSUMED
ADAMW = methods_where("on AdamW", lambda _, m: m.base == "AdamW")
SGD = methods_where("SGD", lambda _, m: m.base is None)

CADENCE = Group(
    "Cadence and scaling",
    [
        Setting("sweep.every", (50, 100, 200, 500, 1000, 1500), PAPER, "steps between refreshes"),
        Setting("model.patch", 16, PAPER),
        Setting("model.image", 224, ASSUMED, "that of table 9's ViT-B and ViT-L"),
        Setting("model.classes", 1000, ASSUMED, "that of table 9's ViT-B and ViT-L"),
        Setting(
            "train.batch",
            128,
            ASSUMED,
            "from the table: 32 refreshes at interval 50 and 16 at 100 are 1,551 to 1,600 steps; "
            "(epoch time - SGD's) / (steady update) is 16.4 at interval 50 for ViT-B and 16.3 for "
            "ViT-L, so they are two epochs of about 782 steps: 100,000 images with batch 128",
        ),
        Setting("train.images", 100_000, ASSUMED, "as train.batch"),
        Setting("train.epochs", 2, ASSUMED, "as train.batch"),
        Setting("train.precision", "bfloat16", ASSUMED),
        Setting("train.compile", True, PAPER, "times are 'compile-adjusted'"),
        Setting("base.optimizer", "SGD", PAPER),
        Setting("base.optimizer", "AdamW", PAPER, method=ADAMW),
        Setting("base.lr", 1e-3, ASSUMED, "only the time is reported"),
        Setting("base.weight_decay", 0.0, ASSUMED, "only the time is reported"),
        Setting("base.momentum", 0.9, ASSUMED, "the table says SGD", method=SGD),
        Setting("probe.rho", 0.05, ASSUMED, "only the time is reported"),
        Setting("probe.norm", "metric", PAPER),
        Setting("llqr.structure", "e-kfac", ASSUMED, "table 9 has e-kfac and diag-kfac"),
        Setting("report.epoch_time", "seconds an epoch without compilation", PAPER),
        Setting("report.epoch_time_without", "the first refresh's overhead", PAPER),
        Setting(
            "report.steady_update",
            "seconds a refresh: (LLQR's epoch - the same method's without LLQR) / refreshes",
            ASSUMED,
            "with 16, 8, 4 refreshes an epoch at intervals 50, 100, 200 it gives the column to 9 % "
            "in 11 of 12 rows; the rows of longer intervals do not follow it",
        ),
        Setting("report.ratios", ("SGD", "SAM"), PAPER, "of the same architecture"),
        Setting("report.hardware", "not given", PAPER),
    ],
)
