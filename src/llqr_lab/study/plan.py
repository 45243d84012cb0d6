"""The studies: which problems and methods, how much tuning, how many seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .methods import ABLATION, METHODS, TRANSLATING, Method
from .problems import PROBLEMS
from .training import Device

__all__ = ["EFFORTS", "READINGS", "STUDIES", "Effort", "Study", "two_by_twos"]

READINGS = ("steps", "seconds")  # that have runs of their own; the third is read off the curves


@dataclass(frozen=True)
class Effort:
    """What a scale spends, beside the sizes of its problems.

    Attributes:
        tuning: settings that each method tries on each problem.
        tuning_seeds: seeds of each of them, not among those of the results.
        seeds: of the results.
        rounds: of measuring what steps cost; their median counts.
    """

    tuning: int
    tuning_seeds: int
    seeds: int
    rounds: int


EFFORTS = {
    "smoke": Effort(2, 1, 2, 1),
    "small": Effort(6, 1, 10, 1),
    "full": Effort(20, 2, 10, 3),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared.

    Attributes:
        title: one line.
        methods: all that it knows.
        chosen: methods of the smaller scales; ``full`` has all.
        problems: of each scale.
        claimed: methods that are expected to be better than the first baseline.
        baselines: the differences are taken to these, seed by seed.
        pictured: methods of the figures of problems.
        glanced: methods of the figure of differences; none: there is no such figure.
        efforts: by scale.
        device: where it computes, at the larger scales.
    """

    title: str
    methods: Mapping[str, Method]
    chosen: Mapping[str, Sequence[str]]
    problems: Mapping[str, Sequence[str]]
    claimed: Sequence[str]
    baselines: Sequence[str] = ("SAM", "SGDM")
    pictured: Sequence[str] = ()
    glanced: Sequence[str] = ()
    efforts: Mapping[str, Effort] = field(default_factory=lambda: EFFORTS)
    device: Device = Device()


SMALL_METHODS = (
    "SGDM",
    "SAM",
    "F-SAM",
    "SAM(interval=5)",
    "AdamW",
    "AdamW + SAM",
    "Muon",
    "Muon + SAM",
    "SOAP",
    "SOAP + SAM",
    "LLQR (paper)",
    "LLQR (paper) + SAM",
    "LLQR",
    "LLQR + SAM",
    "NG",
    "NG + SAM",
    "NG + SAM along g",
    "NG in the probe only",
    "NG + F-SAM",
    "NG + SAM along g (interval=5)",
    "NG by layer",
    "NG on AdamW",
    "NG on AdamW + SAM",
    "NG on AdamW + SAM along g",
    "NG on AdamW + SAM along g (interval=5)",
    "AdamW in U's bases",
    "AdamW in U's bases + SAM along g",
    "AdamW in U's bases + SAM along g (interval=5)",
    "AdamW in GM's bases",
    "AdamW in GM's bases + SAM along g",
    "AdamW in GM's bases + SAM along g (interval=5)",
)
SMOKE_METHODS = ("SGDM", "SAM", "LLQR + SAM", "NG + SAM along g")
GLANCED = (
    "SGDM",
    "AdamW",
    "AdamW + SAM",
    "Muon",
    "SOAP",
    "SOAP + SAM",
    "LLQR",
    "NG",
    "NG + SAM along g",
    "NG + SAM along g (interval=5)",
    "NG on AdamW",
    "NG on AdamW + SAM along g (interval=5)",
    "AdamW in U's bases",
    "AdamW in U's bases + SAM along g (interval=5)",
    "AdamW in GM's bases",
    "AdamW in GM's bases + SAM along g",
    "AdamW in GM's bases + SAM along g (interval=5)",
)
ABLATED = ("cnn", "cnn-noise")
GPU = ("SGDM", "SAM", "SOAP", "NG", "NG + SAM along g", "AdamW in GM's bases")

STUDIES = {
    "proof": Study(
        title="Where a metric wins, at equal cost, against what people use",
        methods=METHODS,
        chosen={"smoke": SMOKE_METHODS, "small": SMALL_METHODS},
        problems={
            "smoke": ("cnn-noise", "characters"),
            "small": (
                "cnn",
                "cnn-long",
                "cnn-long-decay",
                "cnn-noise",
                "cnn-noise-decay",
                "cnn-few",
                "cnn-few-decay",
                "autoencoder",
                "characters",
                "resnet",
                "vit",
            ),
            "full": tuple(p for p in PROBLEMS if p not in ("resnet-wide", "translation")),
        },
        claimed=[name for name, row in METHODS.items() if row.geometry is not None],
        pictured=(
            "SGDM",
            "SAM",
            "AdamW",
            "SOAP",
            "SOAP + SAM",
            "NG",
            "AdamW in GM's bases",
            "NG + SAM along g",
        ),
        glanced=GLANCED,
    ),
    "ablation": Study(
        title="What each setting of the metric does",
        methods=ABLATION,
        chosen={"smoke": ("SGDM", "SAM", "NG", "NG, every 20", "LLQR, one gradient")},
        problems={"smoke": ("cnn",), "small": ABLATED, "full": ABLATED},
        claimed=(),
        baselines=("NG", "SGDM"),
        pictured=("SGDM", "NG", "LLQR, one gradient"),
        efforts=EFFORTS | {"small": Effort(6, 1, 3, 1)},
    ),
    "translation": Study(
        title="Short sentences of LibreOffice's help, German to English",
        methods=TRANSLATING,
        chosen={},
        problems=dict.fromkeys(("smoke", "small", "full"), ("translation",)),
        claimed=("NG on AdamW", "NG on AdamW, damping 3"),
        baselines=("AdamW + SAM", "AdamW"),
        pictured=tuple(TRANSLATING),
        # Long enough to translate, so no search at the small scale: the usual rates and radii.
        efforts=EFFORTS | {"small": Effort(0, 1, 3, 1)},
    ),
    "gpu": Study(
        title="The core on one accelerator: Fashion-MNIST, ResNet-18, bfloat16",
        methods={name: METHODS[name] for name in GPU},
        chosen={},
        problems=dict.fromkeys(("smoke", "small", "full"), ("resnet-wide",)),
        claimed=("NG", "NG + SAM along g"),
        pictured=GPU,
        # No search: rates and radii are the usual ones, in the middle of the ranges.
        efforts={
            "smoke": Effort(0, 1, 2, 1),
            "small": Effort(0, 1, 2, 1),
            "full": Effort(4, 1, 2, 1),
        },
        device=Device("cuda", bfloat16=True),
    ),
}


def two_by_twos(methods: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Return the squares {without U, with U} x {without SAM, with SAM} among some methods.

    Example:
        >>> two_by_twos(["SGDM", "SAM", "NG", "NG + SAM", "LLQR"])
        [('SGDM', 'SAM', 'NG', 'NG + SAM')]
    """
    plain = {"": ("SGDM", "SAM"), " on AdamW": ("AdamW", "AdamW + SAM")}
    squares = [
        (*pair, f"{metric}{base}", f"{metric}{base} + {probe}")
        for base, pair in plain.items()
        for metric in ("NG", "NG by layer", "LLQR", "LLQR (paper)")
        for probe in ("SAM", "SAM along g")
    ] + [
        (
            *plain[" on AdamW"],
            f"AdamW in {metric}'s bases",
            f"AdamW in {metric}'s bases + SAM along g",
        )
        for metric in ("U", "GM")
    ]
    return [square for square in squares if set(square) <= set(methods)]
