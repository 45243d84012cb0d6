"""Fashion-MNIST from its IDX files; Debian has them as the package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import explain_errors, required_path
from .images import Images, Split

__all__ = ["DEBIAN", "fashion_mnist", "read_idx"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HOW = (
    "On Debian or Ubuntu: apt-get install dataset-fashion-mnist (no root: apt-get download "
    "dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR, and pass "
    "DIR/usr/share/datasets/fashion-mnist). Elsewhere: the four *-ubyte.gz files of "
    "https://github.com/zalandoresearch/fashion-mnist."
)


def fashion_mnist(root: str | Path = DEBIAN) -> Split:
    """Load Fashion-MNIST: 60,000 and 10,000 images (1, 28, 28) of 10 classes.

    Args:
        root: the folder with train-images-idx3-ubyte.gz and the three others; by default where
            the Debian package puts them.

    Raises:
        DataError: a file is missing or damaged; says which and where to get it.
    """
    return Split(*(_read_part(Path(root), part) for part in ("train", "t10k")))


def _read_part(root: Path, part: str) -> Images:
    pixels = _read_numbers(root / f"{part}-images-idx3-ubyte.gz", 3)[:, None]
    labels = root / f"{part}-labels-idx1-ubyte.gz"
    values = _read_numbers(labels, 1).long()
    with explain_errors(labels, HOW):
        return Images(pixels, values, 10)


def _read_numbers(path: Path, dimensions: int) -> Tensor:
    required_path(path, HOW)
    with explain_errors(path, HOW), gzip.open(path) as file:
        array = read_idx(file.read())
        if array.dim() != dimensions:
            raise ValueError(f"{array.dim()} dimensions where {dimensions} are expected")
        return array


def read_idx(content: bytes) -> Tensor:
    """Return the bytes of an IDX file as a tensor.

    The format: two zeros, 8 (unsigned bytes), the number of dimensions; each dimension as a
    big-endian 32-bit number; the values, the last dimension fastest.

    Raises:
        ValueError: it is no IDX file of bytes, or its length is not what its header says.
    """
    begin = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\x00\x00\x08" or len(content) < begin:
        raise ValueError("its header is not that of an IDX file of unsigned bytes")
    shape = np.frombuffer(content[4:begin], ">u4").astype(int).tolist()
    values = np.frombuffer(content[begin:], np.uint8)
    if len(values) != np.prod(shape, dtype=int):
        raise ValueError(f"{len(values)} values where the header says {shape}")
    return torch.from_numpy(values.copy()).reshape(shape)
