"""CIFAR-10 and CIFAR-100 from the Python pickles of their home page."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import explain_errors, required_path
from .images import Images, Split

__all__ = ["cifar10", "cifar100"]

HOW = (
    "Get {archive} from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and pass the "
    "folder that holds {folder}."
)
# What an array of bytes needs, under the names it had when the files were written.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Read arrays and plain containers; a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array is made of; refuse all else."""
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no array needs")
        return ALLOWED[module, name]


def cifar10(root: str | Path) -> Split:
    """Load CIFAR-10: 50,000 and 10,000 images (3, 32, 32) of 10 classes.

    Args:
        root: the folder cifar-10-batches-py, or the one that holds it.

    Raises:
        DataError: a file is missing or damaged; says which and where to get it.
    """
    files = [f"data_batch_{i}" for i in range(1, 6)]
    return _load_split(
        Path(root), "cifar-10", "cifar-10-batches-py", files, "test_batch", b"labels", 10
    )


def cifar100(root: str | Path) -> Split:
    """Load CIFAR-100: 50,000 and 10,000 images (3, 32, 32) of 100 (fine) classes.

    Args:
        root: the folder cifar-100-python, or the one that holds it.

    Raises:
        DataError: a file is missing or damaged; says which and where to get it.
    """
    name, folder = "cifar-100", "cifar-100-python"
    return _load_split(Path(root), name, folder, ["train"], "test", b"fine_labels", 100)


def _load_split(
    root: Path, name: str, folder: str, train: list[str], test: str, key: bytes, classes: int
) -> Split:
    how = HOW.format(archive=f"{name}-python.tar.gz", folder=folder)
    home = root if root.name == folder else root / folder
    required_path(home, how)
    read = {f: _read_batch(required_path(home / f, how), key, classes, how) for f in [*train, test]}
    parts = [read[f] for f in train]
    joined = Images(
        torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]), classes
    )
    return Split(joined, read[test])


def _read_batch(path: Path, key: bytes, classes: int, how: str) -> Images:
    with explain_errors(path, how), path.open("rb") as file:
        content = ArraysOnly(file, encoding="bytes").load()
        pixels = torch.from_numpy(content[b"data"]).reshape(-1, 3, 32, 32)
        return Images(pixels, torch.tensor(content[key]), classes)
