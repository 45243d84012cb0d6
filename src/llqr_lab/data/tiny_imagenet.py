"""TinyImageNet-200 from the folder of its archive."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .errors import DataError, explain_errors, required_path
from .images import Images, Split
from .jpeg import decode_image

__all__ = ["tiny_imagenet"]

HOW = (
    "Get tiny-imagenet-200.zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpack it, "
    "and pass the folder tiny-imagenet-200."
)


def tiny_imagenet(root: str | Path, *, threads: int = 4) -> Split:
    """Load TinyImageNet-200: 100,000 and 10,000 images (3, 64, 64) of 200 classes, 1.4 GB.

    The labelled validation images are what papers test on.

    Args:
        root: the folder tiny-imagenet-200, with wnids.txt, train/ and val/.
        threads: that decode.

    Raises:
        DataError: a file is missing or damaged; says which and where to get it.
    """
    root = Path(root)
    listing = required_path(root / "wnids.txt", HOW)
    classes = {name: i for i, name in enumerate(sorted(listing.read_text().split()))}
    train = [
        (path, label)
        for name, label in classes.items()
        for path in _list_pictures(root / "train" / name / "images")
    ]
    annotations = required_path(root / "val" / "val_annotations.txt", HOW)
    test = []
    with explain_errors(annotations, HOW):
        for line in annotations.read_text().splitlines():
            file, name = line.split("\t")[:2]
            test.append((required_path(root / "val" / "images" / file, HOW), classes[name]))
    with ThreadPoolExecutor(threads) as pool:
        return Split(*(_decode_all(part, len(classes), pool) for part in (train, test)))


def _list_pictures(folder: Path) -> list[Path]:
    found = sorted(required_path(folder, HOW).glob("*.JPEG"))
    if not found:
        raise DataError(f"{folder}: there are no *.JPEG files in it. {HOW}")
    return found


def _decode_all(
    samples: Sequence[tuple[Path, int]], classes: int, pool: ThreadPoolExecutor
) -> Images:
    pixels = torch.empty(len(samples), 3, 64, 64, dtype=torch.uint8)

    def place(i: int) -> None:
        path = samples[i][0]
        picture = decode_image(path, HOW)
        if picture.shape != pixels.shape[1:]:
            raise DataError(f"{path}: expected 64 x 64, got {tuple(picture.shape[1:])}. {HOW}")
        pixels[i] = picture

    list(pool.map(place, range(len(samples))))
    return Images(pixels, torch.tensor([label for _, label in samples]), classes)
