"""CIFAR's pickles, written here as Python 2 wrote them."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llqr_lab.data.cifar import cifar10, cifar100
from llqr_lab.data.errors import DataError


class Python2Pickler(pickle._Pickler):
    """Both kinds of strings as Python 2's str: counted bytes."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_str(self, text: str | bytes) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_str


def dumps(content: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


def batch(n: int, seed: int, **labels: list[int]) -> dict[str, Any]:
    data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": data, "batch_label": "b", "filenames": [f"{i}.png" for i in range(n)], **labels}


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(dumps(batch(3, i, labels=[i, 9, 0])))
    return tmp_path


def test_cifar10(ten: Path):
    split = cifar10(ten)
    assert split.train.pixels.shape == (15, 3, 32, 32) and split.train.classes == 10
    assert split.train.labels.tolist() == [x for i in range(5) for x in (i, 9, 0)]
    assert split.test.labels.tolist() == [5, 9, 0]
    # A row is all of red, then green, then blue, each line by line.
    row = batch(3, 1)["data"][2]
    assert split.train.pixels[5, 1, 4, 7] == row[1024 + 4 * 32 + 7]
    assert torch.equal(cifar10(ten / "cifar-10-batches-py").test.pixels, split.test.pixels)


def test_cifar100(tmp_path: Path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for i, name in enumerate(["train", "test"]):
        content = batch(2, i, fine_labels=[99, 0], coarse_labels=[1, 2])
        (folder / name).write_bytes(dumps(content))
    split = cifar100(tmp_path)
    assert split.test.labels.tolist() == [99, 0] and split.train.classes == 100


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path: Path, ten: Path):
    for load, root, path in (
        (cifar10, tmp_path / "no", "no/cifar-10-batches-py"),
        (cifar100, tmp_path, "cifar-100-python"),
    ):
        with pytest.raises(DataError, match=f"{path}: there is no such .*www.cs.toronto.edu"):
            load(root)
    (ten / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4: there is no such .*cifar-10-python.tar.gz"):
        cifar10(ten)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "label":
        path.write_bytes(dumps(batch(3, 0, labels=[0, 1, 10])))
    elif how == "short":
        path.write_bytes(dumps(batch(3, 0, labels=[0, 1])))
    elif how == "keys":
        path.write_bytes(dumps(batch(3, 0)))
    else:
        path.write_bytes(pickle.dumps(print))


@pytest.mark.parametrize("how", ["cut", "label", "short", "keys", "code"])
def test_damaged_files_are_named(ten: Path, how: str):
    damage(ten / "cifar-10-batches-py" / "data_batch_2", how)
    with pytest.raises(DataError, match=r"data_batch_2: damaged, or not .*www.cs.toronto.edu"):
        cifar10(ten)


def test_a_pickle_with_code_is_not_run(ten: Path):
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (ten / "ran",))

    (ten / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Code()))
    with pytest.raises(DataError, match="which no array needs"):
        cifar10(ten)
    assert not (ten / "ran").exists()
