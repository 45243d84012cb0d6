"""torchvision's RandAugment, Mixup and CutMix, drawn from a generator of the run.

torchvision draws from torch's global generator on the CPU: it is seeded from the run's own before
and set back afterwards, so that what is drawn depends on neither the method nor the run's past.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..common.vision import import_vision

__all__ = ["Mixing", "RandAugment"]

STRONGEST = 30  # of torchvision's 31 magnitudes


@contextmanager
def _global_draws(generator: Generator) -> Iterator[None]:
    """Let the body's draws from torch's global generator follow from another generator."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield


class RandAugment:
    """Two random operations on each picture (Cubuk et al., 2020).

    Args:
        magnitude: of the operations, 0 .. 30.

    Raises:
        ValueError: there is no such magnitude.
        ModuleNotFoundError: torchvision is not installed.
    """

    def __init__(self, magnitude: int) -> None:
        """Make torchvision's."""
        if not isinstance(magnitude, int) or not 0 <= magnitude <= STRONGEST:
            raise ValueError(
                f"input.rand_augment: expected a magnitude 0 .. {STRONGEST}, got {magnitude!r}"
            )
        self._augment = import_vision("torchvision.transforms.v2").RandAugment(magnitude=magnitude)

    def __call__(self, pixels: Tensor, generator: Generator) -> Tensor:
        """Return the pictures, uint8 (n, channels, height, width), each changed by itself."""
        with _global_draws(generator):
            return torch.stack([self._augment(picture) for picture in pixels])


class Mixing:
    """Mix each picture and its label with another of the batch.

    With Mixup (Zhang et al., 2018) the mean of both, with CutMix (Yun et al., 2019) a rectangle of
    one in the other, the share drawn from Beta(alpha, alpha). If both are given, each batch is
    mixed by one of them, with equal probability.

    Args:
        classes: number of classes.
        mixup: alpha of Mixup; 0 leaves it out.
        cutmix: alpha of CutMix; 0 leaves it out.

    Raises:
        ValueError: an alpha is negative.
        ModuleNotFoundError: torchvision is not installed.
    """

    def __init__(self, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        """Make torchvision's."""
        self._classes = classes
        self._mixers = []
        for key, alpha, name in (("mixup", mixup, "MixUp"), ("cutmix", cutmix, "CutMix")):
            if alpha < 0:
                raise ValueError(f"input.{key}: expected an alpha above 0, got {alpha}")
            if alpha:
                kind = getattr(import_vision("torchvision.transforms.v2"), name)
                self._mixers.append(kind(alpha=alpha, num_classes=classes))

    def __call__(self, x: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return pictures and labels; mixed labels are probabilities (n, classes)."""
        if not self._mixers:
            return x, labels
        if len(x) == 1:  # nothing to mix with
            return x, F.one_hot(labels, self._classes).to(x)
        with _global_draws(generator):
            which = int(torch.randint(len(self._mixers), ()))
            mixed: tuple[Tensor, Tensor] = self._mixers[which](x, labels)
        return mixed
