"""Settings of IWSLT14 German to English (table 6, figure 4, appendix C.1)."""

from __future__ import annotations

from .settings import Group, Setting, Source

__all__ = ["IWSLT14"]

PAPER, RECIPE, ASSUMED = Source.PAPER, Source.RECIPE, Source.ASSUMED
FAIRSEQ = "fairseq"

IWSLT14 = Group(
    "IWSLT14 German to English",
    [
        Setting("data.preparation", "prepare-iwslt14.sh", RECIPE, FAIRSEQ),
        Setting("data.bpe", 10_000, RECIPE, f"{FAIRSEQ}; joint codes, two vocabularies"),
        Setting("data.lower_case", True, RECIPE, FAIRSEQ),
        Setting("data.max_length", 175, RECIPE, FAIRSEQ),
        Setting("data.max_ratio", 1.5, RECIPE, FAIRSEQ),
        Setting("model.source", 8848, RECIPE, f"{FAIRSEQ}: what the preparation gives"),
        Setting("model.classes", 6632, RECIPE, f"{FAIRSEQ}: what the preparation gives"),
        Setting("model.width", 512, RECIPE, FAIRSEQ),
        Setting("model.hidden", 1024, RECIPE, FAIRSEQ),
        Setting("model.heads", 4, RECIPE, FAIRSEQ),
        Setting("model.layers", 6, RECIPE, FAIRSEQ),
        Setting("model.dropout", 0.3, RECIPE, FAIRSEQ),
        Setting("network.tied", "last layer = decoder embedding", RECIPE, FAIRSEQ),
        Setting("train.tokens", 4096, RECIPE, f"{FAIRSEQ}; a batch, padding included"),
        Setting("train.epochs", 50, ASSUMED, "the recipe has no end"),
        Setting(
            "train.label_smoothing",
            0.1,
            RECIPE,
            f"{FAIRSEQ}; torch also adds 0.1 / classes to the target",
        ),
        Setting("train.schedule", "inverse square root", RECIPE, FAIRSEQ),
        Setting("train.warmup_steps", 4000, RECIPE, f"{FAIRSEQ}; linear from 0"),
        Setting("train.clip_norm", None, RECIPE, FAIRSEQ),
        Setting("train.precision", "float32", ASSUMED),
        Setting("base.optimizer", "AdamW", PAPER, "fairseq's 'adam' decouples the decay"),
        Setting("base.lr", 5e-4, RECIPE, FAIRSEQ),
        Setting("base.betas", (0.9, 0.98), RECIPE, FAIRSEQ),
        Setting("base.eps", 1e-8, RECIPE, FAIRSEQ),
        Setting("base.weight_decay", 1e-4, RECIPE, FAIRSEQ),
        Setting("probe.rho", 0.005, PAPER, "best on validation data in [0.0005, 0.2]"),
        Setting("search.rho", (0.0005, 0.2), PAPER, "the ends of the range; the grid is not given"),
        Setting(
            "probe.start",
            4000,
            PAPER,
            "after the warm-up: that of train.warmup_steps",
            follows="train.warmup_steps",
        ),
        Setting("probe.norm", "metric", PAPER, "the authors' commands run 'euclidean'"),
        Setting("llqr.ema", 0.925, PAPER),
        Setting("llqr.every", 500, PAPER, "'unchanged'; the authors' commands have 1000"),
        Setting("llqr.structure", "e-kfac", ASSUMED, "not in the text"),
        Setting(
            "llqr.block_size",
            None,
            RECIPE,
            "authors' code: whole layers, the embeddings' 8,848 x 8,848 and 6,632 x 6,632 too",
        ),
        Setting(
            "refresh.batch",
            128,
            ASSUMED,
            "the paper's number for images, read as sentences; a batch of tokens is as likely",
        ),
        Setting("optimizer.buffers", "clean", ASSUMED, "the model has none"),
        Setting("report.metric", "best validation BLEU of all epochs", PAPER),
        Setting("report.bleu", "sacrebleu on detokenised text", RECIPE, FAIRSEQ),
        Setting(
            "report.beam", 5, RECIPE, f"{FAIRSEQ}; its search also stops at the first 5 that end"
        ),
        Setting("report.length_penalty", 1.0, RECIPE, FAIRSEQ),
        Setting("report.max_length", "1.2 n + 10", RECIPE, FAIRSEQ),
        Setting("report.spread", "mean and standard deviation over seeds", PAPER),
        Setting("report.seeds", (0, 1, 2, 3, 4), ASSUMED, "five seeds are the paper's"),
        Setting("report.hardware", "NVIDIA L40S", PAPER),
    ],
)
