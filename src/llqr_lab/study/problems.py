"""The problems of the study, one row each, with their sizes at each scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.augment import random_crop, random_flip
from ..models.autoencoder import autoencoder
from ..models.language import LanguageModel
from ..models.norm_cnn import norm_cnn
from ..models.resnet import resnet18
from ..models.small_cnn import small_cnn
from ..models.vit import VisionTransformer
from ..recipes.draws import generator_for, seed_of
from .data import Data, Examples, image_set, pair_set, seed_data, text_set
from .metrics import METRICS, MetricName
from .translation import PairTranslator, bleu, token_loss

__all__ = ["DECAY_SEARCHED", "PROBLEMS", "SCALES", "Problem", "Size"]

SCALES = ("smoke", "small", "full")
DECAY_SEARCHED = "-decay"  # ends the names of problems whose weight decay is searched, too


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a problem is.

    Attributes:
        steps: of the reading at equal steps; SAM's time for them is the budget at equal seconds.
        batch: examples of a step.
        train: training examples, drawn from the pool by the seed.
        pool: examples that seeds draw from.
        validation: examples that tuning looks at.
        test: examples of the results.
        source: of the data.
        extent: side of the images, characters of a piece of text, or tokens of a sentence.
        network: sizes of the network.
    """

    steps: int
    batch: int
    train: int
    pool: int
    validation: int
    test: int
    source: str
    extent: int
    network: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the sizes as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """What problems of a kind share: data, network, loss(outputs, targets), and what counts."""

    data: Callable[[Size], Data]
    network: Callable[[Size], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: MetricName


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Data, a network, a loss, and what counts.

    Attributes:
        title: one line.
        kind: of the data and the network.
        sizes: at each scale that it has.
        rates: the usual learning rate of each family, in the middle of the search.
        noise: share of wrong training labels.
        augment: whether training images are moved and mirrored.
        search_decay: whether the weight decay is searched, too, in twice the runs.
    """

    title: str
    kind: Kind
    sizes: Mapping[str, Size]
    rates: Mapping[str, float]
    noise: float = 0.0
    augment: bool = False
    search_decay: bool = False

    @property
    def metric(self) -> MetricName:
        """What the tables show: the accuracy in percent, the BLEU, or the loss."""
        return self.kind.metric

    @property
    def sign(self) -> int:
        """1 if a higher metric is better, else -1."""
        return METRICS[self.metric].sign

    def network(self, size: Size, seed: int) -> nn.Module:
        """Return the network; its weights depend only on the seed."""
        torch.manual_seed(seed_of(seed, "initialisation"))
        return self.kind.network(size)

    def data(self, size: Size, seed: int, device: torch.device) -> Data:
        """Return the data of a seed."""
        return seed_data(self.kind.data(size), seed, size.train, self.noise, device)

    def bleu(self, size: Size, network: nn.Module, examples: Examples) -> float:
        """Return the BLEU of a network that translates."""
        return bleu(size.source, size.network["tokens"], network, examples)

    def augmented(self, batch: Examples, seed: int, step: int) -> Examples:
        """Return the examples of a step as they are trained on."""
        if not self.augment:
            return batch
        draws = generator_for(seed, "augment", step, device=batch.inputs.device)
        return Examples(random_flip(random_crop(batch.inputs, 2, draws), draws), batch.targets)


def _images(size: Size) -> Data:
    return image_set(size.source, size.extent, size.pool, size.validation, size.test)


def _pixels(size: Size) -> Data:
    """Images as what is to be reconstructed: the targets are pixels between 0 and 1."""

    def pair(part: Examples) -> Examples:
        x = part.inputs.flatten(1)
        return Examples(x, (x - low) / (high - low))

    whole = _images(size)
    low, high = whole.train.inputs.min(), whole.train.inputs.max()
    return Data(*(pair(part) for part in whole))


def _text(size: Size) -> Data:
    tokens = size.network["tokens"]
    return text_set(size.source, size.extent, tokens, size.pool, size.validation, size.test)


def _sentences(size: Size) -> Data:
    tokens = size.network["tokens"]
    return pair_set(size.source, size.extent, tokens, size.pool, size.validation, size.test)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _classifier(network: Callable[..., nn.Module], **fixed: Any) -> Kind:
    def build(size: Size) -> nn.Module:
        return network(**fixed, **size.network)

    return Kind(_images, build, _cross_entropy, "accuracy")


CNN = Kind(_images, lambda s: norm_cnn(image=s.extent, **s.network), _cross_entropy, "accuracy")
RESNET = _classifier(resnet18, classes=10, channels=1)
VIT = Kind(
    _images,
    lambda s: VisionTransformer(image=s.extent, classes=10, channels=1, **s.network),
    _cross_entropy,
    "accuracy",
)
DIGITS = _classifier(small_cnn)
AUTOENCODER = Kind(
    _pixels,
    lambda s: autoencoder(s.extent**2, **s.network),
    F.binary_cross_entropy_with_logits,
    "loss",
)
LANGUAGE = Kind(
    _text, lambda s: LanguageModel(length=s.extent, **s.network), _cross_entropy, "loss"
)
TRANSLATION = Kind(_sentences, lambda s: PairTranslator(**s.network), token_loss, "bleu")


def _smoke(extent: int = 8, source: str = "digits", **network: Any) -> Size:
    return Size(
        steps=4, batch=16, train=64, pool=128, validation=64, test=64, source=source, extent=extent,
        network=network,
    )  # fmt: skip


def _fashion(steps: int, train: int, extent: int = 14, batch: int = 128, **network: Any) -> Size:
    pool = max(train, 8_000) if train <= 12_000 else 54_000
    large = extent == 28 or train > 12_000
    return Size(
        steps=steps, batch=batch, train=train, pool=pool, validation=4_000 if large else 2_000,
        test=10_000 if large else 5_000,
        source="fashion-mnist", extent=extent, network=network,
    )  # fmt: skip


def _help(steps: int, train: int, extent: int, batch: int, **network: Any) -> Size:
    return Size(
        steps=steps, batch=batch, train=train, pool=train, validation=1_000, test=1_000,
        source="help-texts", extent=extent, network={"tokens": 96, **network},
    )  # fmt: skip


def _translation(steps: int, extent: int, **network: Any) -> Size:
    return Size(
        steps=steps, batch=128, train=30_000, pool=30_000, validation=2_000, test=2_000,
        source="help-texts", extent=extent, network=network,
    )  # fmt: skip


SGD_AND_ADAM = {"sgd": 0.1, "adam": 3e-3}
PROBLEMS: dict[str, Problem] = {
    "cnn": Problem(
        title="CNN with batch norm",
        kind=CNN,
        rates=SGD_AND_ADAM,
        sizes={
            "smoke": _smoke(),
            "small": _fashion(140, 12_000, width=8),
            "full": _fashion(3_000, 50_000),
        },
    ),
    "cnn-long": Problem(
        title="CNN with batch norm, ten epochs",
        kind=CNN,
        rates=SGD_AND_ADAM,
        sizes={
            "smoke": _smoke(),
            "small": _fashion(1_000, 12_000, width=8),
            "full": _fashion(10_000, 50_000),
        },
    ),
    "cnn-noise": Problem(
        title="CNN with batch norm, 30 % of the training labels wrong",
        kind=CNN,
        noise=0.3,
        rates=SGD_AND_ADAM,
        sizes={
            "smoke": _smoke(),
            "small": _fashion(140, 1_000, width=8),
            "full": _fashion(3_000, 50_000),
        },
    ),
    "cnn-few": Problem(
        title="CNN with batch norm, 2,000 images",
        kind=CNN,
        rates=SGD_AND_ADAM,
        sizes={
            "smoke": _smoke(),
            "small": _fashion(140, 2_000, width=8),
            "full": _fashion(1_000, 2_000),
        },
    ),
    "autoencoder": Problem(
        title="deep autoencoder",
        kind=AUTOENCODER,
        rates={"sgd": 3.0, "adam": 3e-3},
        sizes={
            "smoke": _smoke(widths=(16, 4)),
            "small": _fashion(380, 12_000, widths=(128, 64, 12)),
            "full": _fashion(3_000, 50_000, 28, widths=(1000, 500, 250, 30)),
        },
    ),
    "characters": Problem(
        title="transformer, character by character",
        kind=LANGUAGE,
        rates={"sgd": 0.3, "adam": 3e-3},
        sizes={
            "smoke": _smoke(16, "number-words", tokens=30, width=8, depth=1, heads=2),
            "small": _help(180, 20_000, 32, 16, width=32, depth=2, heads=2),
            "full": _help(4_000, 30_000, 64, 32, width=128, depth=4, heads=4),
        },
    ),
    "translation": Problem(
        title="translation of short sentences, German to English",
        kind=TRANSLATION,
        rates={"sgd": 0.3, "adam": 5e-3},
        sizes={
            "smoke": _smoke(16, "number-words", tokens=60, width=8, hidden=16, heads=2, layers=1),
            "small": _translation(200, 12, tokens=1000, width=64, hidden=128, heads=2, layers=1),
            "full": _translation(4_000, 24, tokens=2000, width=128, hidden=256, heads=4, layers=3),
        },
    ),
    "resnet": Problem(
        title="ResNet-18 of width 16, augmentation",
        kind=RESNET,
        rates=SGD_AND_ADAM,
        augment=True,
        sizes={
            "smoke": _smoke(width=4, blocks=(1, 1)),
            "small": _fashion(120, 8_000, width=8),
            "full": _fashion(2_000, 50_000, 28, width=16),
        },
    ),
    "vit": Problem(
        title="small vision transformer, augmentation",
        kind=VIT,
        rates={"sgd": 0.1, "adam": 1e-3},
        augment=True,
        sizes={
            "smoke": _smoke(width=8, depth=1, heads=2, patch=4),
            "small": _fashion(120, 8_000, width=32, depth=3, heads=2, patch=7),
            "full": _fashion(3_000, 50_000, 28, width=96, depth=6, heads=3, patch=4),
        },
    ),
    "resnet-wide": Problem(
        title="ResNet-18, augmentation",
        kind=RESNET,
        rates=SGD_AND_ADAM,
        augment=True,
        sizes={
            "smoke": _smoke(width=4, blocks=(1, 1)),
            "small": _fashion(600, 50_000, 28, width=64),
            "full": _fashion(1_800, 50_000, 28, width=64),
        },
    ),
    "digits": Problem(
        title="small CNN on handwritten digits, 40 % of the training labels wrong",
        kind=DIGITS,
        noise=0.4,
        rates=SGD_AND_ADAM,
        sizes={
            scale: Size(
                steps=steps,
                batch=64,
                train=900,
                pool=1_000,
                validation=297,
                test=500,
                source="digits",
                extent=8,
            )  # fmt: skip
            for scale, steps in (("small", 400), ("full", 600))
        }
        | {"smoke": _smoke()},
    ),
}
#: Where examples are seen often enough that a weight decay decides what is learned by heart.
PROBLEMS |= {
    f"{name}{DECAY_SEARCHED}": replace(
        PROBLEMS[name],
        title=f"{PROBLEMS[name].title}, weight decay searched too",
        search_decay=True,
    )
    for name in ("cnn-long", "cnn-noise", "cnn-few")
}
