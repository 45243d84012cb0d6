"""The tables and figures: which runs they show, and the settings of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..common.vision import is_packaged
from .demo import DEMO, DEMO_KEYS, DEMO_METHODS
from .own import FASHION, HELP_TEXTS, tuned_settings
from .scales import SCALES, SMALL_CADENCE, SMALL_IMAGES, SMALL_TEXT, SMOKE
from .scaling import ADAMW, CADENCE
from .settings import METHODS, Group, Setting, Source
from .translation import IWSLT14
from .vision import (
    CIFAR,
    IMAGENET,
    IMAGENET_TEXT,
    LABEL_NOISE,
    LLQR,
    PROBES,
    SUPERVISED,
    TINY,
)

__all__ = ["EXPERIMENTS", "Experiment", "OWN", "resolve_settings"]

PAPER, ASSUMED = Source.PAPER, Source.ASSUMED
IMAGES = (SUPERVISED, CIFAR, LLQR, PROBES)
CIFAR_MODELS = ("vgg16-bn", "resnet18", "wrn-28-10", "pyramidnet-110")
STANDARD = (
    "SGDM",
    "LLQR (NGD)",
    "LLQR (Newton)",
    "SAM",
    "FisherSAM",
    "LLQR+SAM (NGD)",
    "LLQR+SAM (Newton)",
)
WITHOUT_FISHER_SAM = tuple(name for name in STANDARD if name != "FisherSAM")
WITH_FRIENDLY_SAM = (
    "SGDM",
    "LLQR (NGD)",
    "LLQR (Newton)",
    "F-SAM",
    "LLQR+F-SAM (NGD)",
    "LLQR+F-SAM (Newton)",
)
TIMED = ("SGDM", "AdamW", "SAM", "LLQR (NGD)", "LLQR+SAM (NGD)")


@dataclass(frozen=True)
class Experiment:
    """A table or a figure.

    Attributes:
        title: what it shows.
        datasets: the names of its data sets.
        models: names in :data:`llqr_lab.models.registry.MODELS`.
        methods: names in :data:`METHODS`.
        groups: shared settings; a later group goes before an earlier one.
        own: settings of this experiment only; they go before those of the groups.
        small: what changes at the scales "small" and "smoke".
    """

    title: str
    datasets: Sequence[str]
    models: Sequence[str]
    methods: Sequence[str]
    groups: Sequence[Group]
    own: Sequence[Setting] = field(default=())
    small: Group = SMALL_IMAGES

    def takes_model(self, name: str) -> bool:
        """Tell whether a network is one of its own, or classifies pictures in another package."""
        return name in self.models or (is_packaged(name) and self.takes_pictures)

    @property
    def takes_pictures(self) -> bool:
        """Whether its networks classify pictures."""
        return "transformer-iwslt" not in self.models


EXPERIMENTS = {
    "table1": Experiment("CIFAR-10", ["CIFAR-10"], CIFAR_MODELS, STANDARD, IMAGES),
    "table2": Experiment("CIFAR-100", ["CIFAR-100"], CIFAR_MODELS, STANDARD, IMAGES),
    "table3": Experiment(
        "TinyImageNet-200",
        ["TinyImageNet-200"],
        ["resnet18", "wrn-28-10"],
        WITHOUT_FISHER_SAM,
        (*IMAGES, TINY),
    ),
    "table4": Experiment(
        "Friendly SAM on CIFAR",
        ["CIFAR-10", "CIFAR-100"],
        CIFAR_MODELS,
        ["SAM", "F-SAM", "LLQR+SAM (NGD)", "LLQR+F-SAM (NGD)"],
        IMAGES,
    ),
    "table5": Experiment(
        "ImageNet",
        ["ImageNet"],
        ["resnet50"],
        WITH_FRIENDLY_SAM,
        (*IMAGES, IMAGENET_TEXT, IMAGENET),
    ),
    "table5-literal": Experiment(
        "ImageNet, the text read literally: CIFAR's training",
        ["ImageNet"],
        ["resnet50"],
        WITH_FRIENDLY_SAM,
        (*IMAGES, IMAGENET_TEXT),
    ),
    "table6": Experiment(
        "IWSLT14 German to English",
        ["IWSLT14"],
        ["transformer-iwslt"],
        ["AdamW", "LLQR (NGD)", "SAM", "LLQR+SAM (NGD)"],
        (LLQR, IWSLT14),
        small=SMALL_TEXT,
    ),
    "table7": Experiment(
        "Geometry only in the probe",
        ["CIFAR-100"],
        ["resnet18"],
        ["FisherSAM", "LLQR^Delta+SAM", "LLQR+SAM (NGD)"],
        IMAGES,
    ),
    "table8": Experiment(
        "Label noise on CIFAR-100",
        ["CIFAR-100"],
        ["resnet18"],
        ["SGDM", "Adam", "LLQR (NGD)", "SAM", "LLQR+SAM (NGD)"],
        (*IMAGES, LABEL_NOISE),
        [Setting("network.choice", "resnet18", ASSUMED, "the text names no network")],
    ),
    "table10": Experiment(
        "Cadence of refreshes",
        ["ImageNet-scale images"],
        ["vit-b16", "vit-l16"],
        TIMED,
        (LLQR, CADENCE),
        small=SMALL_CADENCE,
    ),
    "figure1": Experiment(
        "ImageNet: error by epoch, test loss by time",
        ["ImageNet"],
        ["resnet50"],
        ["SGDM", "LLQR (NGD)", "F-SAM", "LLQR+F-SAM (NGD)"],
        (*IMAGES, IMAGENET_TEXT, IMAGENET),
        [
            Setting("report.left", "top-1 error against epochs", PAPER),
            Setting("report.right", "test loss against elapsed time", PAPER),
            Setting("report.runs", "those of table 5", ASSUMED),
        ],
    ),
    "figure4": Experiment(
        "IWSLT14: validation curves",
        ["IWSLT14"],
        ["transformer-iwslt"],
        ["AdamW", "LLQR (NGD)", "SAM", "LLQR+SAM (NGD)"],
        (LLQR, IWSLT14),
        [
            Setting("report.left", "validation BLEU", PAPER),
            Setting("report.right", "token error", PAPER),
            Setting(
                "report.token_error",
                "fraction of validation tokens that are not the likeliest, given the true prefix",
                ASSUMED,
            ),
            Setting("report.runs", "those of table 6", ASSUMED),
        ],
        small=SMALL_TEXT,
    ),
    "figure5": Experiment(
        "Epoch time against the interval",
        ["ImageNet-scale images"],
        ["vit-b16", "vit-l16"],
        TIMED,
        (LLQR, CADENCE),
        [Setting("report.runs", "those of table 10", PAPER)],
        small=SMALL_CADENCE,
    ),
    "figure6": Experiment(
        "Refresh time against the size of the network",
        ["ImageNet-scale images"],
        ["vit-ti16", "vit-s16", "vit-b16", "vit-l16"],
        ["LLQR (NGD)", "LLQR+SAM (NGD)"],
        (LLQR, CADENCE),
        [
            Setting("sweep.model", ("Ti", "S", "B", "L"), ASSUMED, "'ViT-Tiny/16 to ViT-Large/16'"),
            Setting("llqr.every", 500, ASSUMED, "which interval the figure shows is not given"),
            Setting("report.fit", "steady update = c P^a, least squares of logarithms", ASSUMED),
            Setting(
                "report.exponents",
                (1.27, 1.28),
                PAPER,
                "of LLQR and LLQR+SAM; the paper does not say which is which",
            ),
        ],
        small=SMALL_CADENCE,
    ),
}


WITH_U = ("LLQR (NGD)", "LLQR+SAM (NGD)", "NG", "NG+SAM")
FASHION_METHODS = ("SGDM", "AdamW", "SAM", "F-SAM", *WITH_U)
HELP_METHODS = ("AdamW", "SAM", *WITH_U)
# A method with U takes what was searched for the same method without.
ALSO_SAMS = {"SAM": ("SAM", "LLQR+SAM (NGD)", "NG+SAM")}
ALSO_SGDMS = {"SGDM": ("SGDM", "LLQR (NGD)", "NG"), **ALSO_SAMS}
ALSO_ADAMWS = {"AdamW": ("AdamW", "LLQR (NGD)", "NG"), **ALSO_SAMS}
NOTHING = Group("", [])
# No experiments of the paper: they have one size.
EXPERIMENTS |= {
    name: Experiment(
        f"Fashion-MNIST{title}",
        ["Fashion-MNIST"],
        ["vgg16-bn"],
        FASHION_METHODS,
        (SUPERVISED, LLQR, PROBES, FASHION),
        [
            Setting("base.optimizer", "AdamW", Source.SCALE, method=ADAMW),
            *tuned_settings(name, ALSO_SGDMS),
        ],
        small=NOTHING,
    )
    for name, title in (("fashion", ""), ("fashion-noise", ", 40 % of the training labels wrong"))
}
EXPERIMENTS["help-texts"] = Experiment(
    "LibreOffice's help, German to English",
    ["help-texts"],
    ["transformer-iwslt"],
    HELP_METHODS,
    (LLQR, IWSLT14, HELP_TEXTS),
    list(tuned_settings("help-texts", ALSO_ADAMWS)),
    small=NOTHING,
)
OWN = ("fashion", "fashion-noise", "help-texts")  # of docs/results.md
EXPERIMENTS["demo"] = Experiment(
    "The demo, 40 % of the training labels wrong",
    ["digits"],
    ["small-cnn"],
    list(DEMO_METHODS.values()),
    (SUPERVISED, LLQR, PROBES, DEMO),
    [
        Setting("base.optimizer", "AdamW", Source.SCALE, method=ADAMW),
        Setting("base.weight_decay", 0.01, Source.SCALE, "torch's default", method=ADAMW),
        *tuned_settings("demo", {k: [v] for k, v in DEMO_METHODS.items()}, DEMO_KEYS),
    ],
    small=NOTHING,
)


def resolve_settings(
    name: str, dataset: str, model: str, method: str, scale: str = "paper"
) -> dict[str, Setting]:
    """Return the settings of one run by their keys.

    Args:
        name: of the experiment.
        dataset: one of its data sets.
        model: one of its models, or of another package: it gets what holds for all.
        method: one of its methods.
        scale: "paper"; "small", on data at hand and in minutes; "smoke", in seconds.

    Raises:
        ValueError: the experiment has no such run.

    Example:
        >>> run = resolve_settings("table2", "CIFAR-100", "resnet18", "LLQR+SAM (NGD)")
        >>> run["probe.rho"].value, run["probe.rho"].source.value
        (0.2, 'paper')
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"name: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    experiment = EXPERIMENTS[name]
    for argument, value, allowed in (
        ("dataset", dataset, experiment.datasets),
        ("model", model, [model] if experiment.takes_model(model) else experiment.models),
        ("method", method, experiment.methods),
        ("scale", scale, SCALES),
    ):
        if value not in allowed:
            raise ValueError(f"{argument}: {name} has {', '.join(allowed)}, got {value!r}")
    kind = METHODS[method]
    candidates = [s for group in experiment.groups for s in group]
    candidates += [*experiment.own, *kind.own_settings()]
    candidates += experiment.small if scale != "paper" else ()
    # From the general to the particular: a later setting replaces an earlier one of its key.
    chosen: dict[str, Setting] = {}
    for setting in candidates:
        used = kind.uses_setting(setting.key) and not kind.leaves_to_library(setting.key)
        if used and setting.holds_for(dataset, model, method):
            chosen[setting.key] = setting
    # Only what the run has anyway: a smoke run of images gets no setting of translation.
    smoke = {s.key: s for s in SMOKE if s.key in chosen} if scale == "smoke" else {}
    chosen |= smoke
    if is_packaged(model):  # a network of another package has its own sizes
        sizes = {k for k in chosen if k.startswith("model.")} - {"model.image", "model.classes"}
        chosen = {k: s for k, s in chosen.items() if k not in sizes}
    return {
        key: replace(s, value=chosen[s.follows].value) if s.follows else s
        for key, s in chosen.items()
    }
