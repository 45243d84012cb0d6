"""Made-up data in every format that the recipes read: noise for pictures, drawn words for text.

They show that a format is read and a network trained, on a machine that has none of the real data.
The numbers of classes and of words are the real ones, since they are sizes of the networks.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .iwslt14 import TESTS
from .tokens import SPECIAL

__all__ = ["FORMATS", "made_up_data"]

FEW = 16  # pictures of a part that has no class folders
SIZES = {"de": 8848, "en": 6632}  # fairseq's vocabularies, special tokens included
WORDS_A_SENTENCE = 10


def made_up_data(name: str, folder: Path) -> Path:
    """Write data of a format below a folder, unless they are there; return what ``data=`` takes.

    Args:
        name: a key of :data:`FORMATS`.
        folder: where they go.

    Raises:
        KeyError: there is no such format.
    """
    write = FORMATS[name]
    home = folder / name
    if not (complete := home / ".complete").exists():
        home.mkdir(parents=True, exist_ok=True)
        write(home)
        complete.touch()
    return home


def _random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _write_cifar(folder: Path, files: Sequence[str], key: bytes, classes: int) -> None:
    folder.mkdir()
    labels = [i * classes // FEW for i in range(FEW)]
    # Protocol 3: bytes as such; the reader takes nothing but arrays and plain containers.
    content = pickle.dumps({b"data": _random_pixels(FEW, 3072), key: labels}, protocol=3)
    for name in files:
        (folder / name).write_bytes(content)


def _write_cifar10(home: Path) -> None:
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    _write_cifar(home / "cifar-10-batches-py", files, b"labels", 10)


def _write_cifar100(home: Path) -> None:
    _write_cifar(home / "cifar-100-python", ["train", "test"], b"fine_labels", 100)


def _write_picture(path: Path, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_random_pixels(side, side, 3)).save(path, "JPEG")


def _write_tiny_imagenet(home: Path) -> None:
    names = [f"n{i:08}" for i in range(200)]
    (home / "wnids.txt").write_text("\n".join(names) + "\n")
    lines = []
    for i, name in enumerate(names):
        _write_picture(home / "train" / name / "images" / f"{name}_0.JPEG", 64)
        _write_picture(home / "val" / "images" / f"val_{i}.JPEG", 64)
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n")
    (home / "val" / "val_annotations.txt").write_text("".join(lines))


def _write_imagenet(home: Path) -> None:
    for part in ("train", "val"):
        for i in range(1000):
            _write_picture(home / part / f"n{i:08}" / "0.JPEG", 64)


def _write_fashion_mnist(home: Path) -> None:
    pixels = _random_pixels(FEW, 28, 28)
    labels = np.arange(FEW, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        for what, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            with gzip.open(home / f"{part}-{what}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())


def _word(number: int) -> str:
    letters = []
    for _ in range(4):
        number, rest = divmod(number, 26)
        letters.append(chr(ord("a") + rest))
    return "".join(letters)


def _sentences(language: str, count: int | None = None) -> list[str]:
    """Return sentences that have every word of a vocabulary, or the first of them."""
    words = [_word(i) for i in range(SIZES[language] - len(SPECIAL))]
    needed = -(-(max(SIZES.values()) - len(SPECIAL)) // WORDS_A_SENTENCE)
    repeated = np.resize(words, needed * WORDS_A_SENTENCE).reshape(needed, WORDS_A_SENTENCE)
    return [" ".join(line) for line in repeated[:count]]


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_iwslt14_tokenised(home: Path) -> None:
    for language in SIZES:
        for part, count in (("train", None), ("valid", FEW), ("test", FEW)):
            _write_lines(home / f"{part}.{language}", _sentences(language, count))


def _write_iwslt14_raw(home: Path) -> None:
    for language in SIZES:
        lines = ["<url>made up</url>", "<title>made up</title>", *_sentences(language)]
        _write_lines(home / f"train.tags.de-en.{language}", lines)
        segments = [f'<seg id="{i}"> {s} </seg>' for i, s in enumerate(_sentences(language, FEW))]
        for test in TESTS:
            _write_lines(home / f"IWSLT14.{test}.de-en.{language}.xml", segments)


def _write_help_texts(home: Path) -> None:
    for folder, language in (("de", "de"), ("en-US", "en")):
        for i, text in enumerate(_sentences(language, 100)):
            path = home / folder / "text" / f"page{i}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'<p id="par_1">{language} {text}</p>\n', encoding="utf-8")


#: What is written, by the name of the format.
FORMATS: dict[str, Callable[[Path], None]] = {
    "cifar-10": _write_cifar10,
    "cifar-100": _write_cifar100,
    "tinyimagenet-200": _write_tiny_imagenet,
    "imagenet": _write_imagenet,
    "fashion-mnist": _write_fashion_mnist,
    "iwslt14": _write_iwslt14_tokenised,
    "iwslt14-raw": _write_iwslt14_raw,
    "help-texts": _write_help_texts,
}
