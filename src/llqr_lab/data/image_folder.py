"""Folders of classes with pictures in them, as ImageNet lies on disk; decoded when asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset, Sampler

from .errors import DataError, required_path
from .jpeg import decode_image

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageFolder", "Shuffled"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HOW = (
    "Pass a folder with one subfolder a class and the pictures in it, as train/n01440764/*.JPEG; "
    "ImageNet itself needs an account at https://image-net.org."
)
SUFFIXES = {".jpeg", ".jpg", ".png"}
Key = int | tuple[int, int]


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Pictures of a folder as (uint8 (3, side, side), label); classes in the order of their names.

    A key is an index (the middle of the picture: evaluation) or an index and a number that decides
    the part that is shown (training). So a worker process needs no random state of its own, and
    what a picture looks like does not depend on the number of workers.

    Args:
        root: folder of the class folders.
        side: of the pictures, in pixels.

    Raises:
        DataError: there is no such folder, no class, or a class without pictures.
    """

    def __init__(self, root: str | Path, *, side: int = 224) -> None:
        """List the files; nothing is decoded yet."""
        folders = sorted(p for p in required_path(Path(root), HOW).iterdir() if p.is_dir())
        if not folders:
            raise DataError(f"{root}: there are no class folders in it. {HOW}")
        self.side, self.classes = side, len(folders)
        self.names = [folder.name for folder in folders]
        self.files: list[tuple[Path, int]] = []
        for label, folder in enumerate(folders):
            found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{folder}: there are no pictures in it. {HOW}")
            self.files += [(path, label) for path in found]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.files)

    def part(self, chosen: Tensor) -> ImageFolder:
        """Return the folder with only these of its pictures, in this order."""
        found = copy.copy(self)
        found.files = [self.files[i] for i in chosen.tolist()]
        return found

    def relabel(self, labels: Tensor) -> None:
        """Give the pictures other labels."""
        paths = [path for path, _ in self.files]
        self.files = list(zip(paths, labels.tolist(), strict=True))

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return a picture and its label."""
        index, draw = key if isinstance(key, tuple) else (key, None)
        generator = None if draw is None else Generator().manual_seed(draw)
        path, label = self.files[index]
        return decode_image(path, HOW, self.side, generator), label


class Shuffled(Sampler[tuple[int, int]]):
    """All indices in random order, each with a number that decides how its picture is cropped.

    Args:
        count: number of pictures.
        generator: draws both, anew in every pass.
    """

    def __init__(self, count: int, generator: Generator) -> None:
        """Keep the generator; it advances once a pass."""
        self.count, self.generator = count, generator

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Return the keys of one pass."""
        order = torch.randperm(self.count, generator=self.generator)
        draws = torch.randint(2**62, (self.count,), generator=self.generator)
        return iter(list(zip(order.tolist(), draws.tolist(), strict=True)))
