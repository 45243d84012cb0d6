"""IDX files, and the Debian package where it is installed."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from llqr_lab.data.errors import DataError
from llqr_lab.data.fashion_mnist import DEBIAN, fashion_mnist, read_idx

REAL = Path(os.environ.get("LLQR_FASHION_MNIST", DEBIAN))


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, n in (("train", 4), ("t10k", 2)):
        pixels = np.arange(n * 28 * 28).reshape(n, 28, 28) % 251
        images, labels = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        (tmp_path / images).write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / labels).write_bytes(gzip.compress(idx(9 - np.arange(n))))
    return tmp_path


def test_four_files(folder: Path):
    split = fashion_mnist(folder)
    assert split.train.pixels.shape == (4, 1, 28, 28) and split.test.pixels.shape == (2, 1, 28, 28)
    assert split.train.labels.tolist() == [9, 8, 7, 6]
    assert split.train.pixels[2, 0, 3, 5] == (2 * 784 + 3 * 28 + 5) % 251


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x0d\1", b"\0\0\x08\1\0\0\0\3ab", b"\0\0\x08\2\0\0"]
)
def test_other_bytes_are_no_idx_file(content: bytes):
    with pytest.raises(ValueError, match="header"):
        read_idx(content)


def test_missing_and_damaged_files_are_named(folder: Path):
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.array([1, 2, 3]))))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz: damaged.*apt-get install"):
        fashion_mnist(folder)
    labels.write_bytes(labels.read_bytes()[:-12])
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz: damaged.*apt-get install"):
        fashion_mnist(folder)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.array([1]))))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz: damaged.*1 dimensions"):
        fashion_mnist(folder)
    labels.unlink()
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="train-images.*there is no such.*dataset-fashion-mnist"):
        fashion_mnist(folder)


@pytest.mark.skipif(
    not REAL.exists(),
    reason=f"Fashion-MNIST is not in {REAL}: apt-get install dataset-fashion-mnist",
)
def test_the_real_images():
    split = fashion_mnist(REAL)
    assert split.train.pixels.shape == (60_000, 1, 28, 28)
    assert split.train.labels.bincount().tolist() == [6000] * 10
    assert split.test.labels.bincount().tolist() == [1000] * 10
    (mean,), (std,) = split.train.channel_statistics()
    assert (round(mean, 4), round(std, 4)) == (0.2860, 0.3530)
