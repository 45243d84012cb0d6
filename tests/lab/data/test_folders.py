"""TinyImageNet and ImageNet folders, with pictures made here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader

from llqr_lab.data.errors import DataError
from llqr_lab.data.image_folder import ImageFolder, Shuffled
from llqr_lab.data.jpeg import central_box, decode_image, random_box
from llqr_lab.data.tiny_imagenet import tiny_imagenet


def picture(path: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path, "JPEG")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    picture(tmp_path / "train/n01/images/n01_0.JPEG", (200, 0, 0))
    picture(tmp_path / "train/n01/images/n01_1.JPEG", 90)
    picture(tmp_path / "train/n02/images/n02_0.JPEG", (0, 0, 200))
    picture(tmp_path / "val/images/val_0.JPEG", (0, 0, 200))
    picture(tmp_path / "val/images/val_1.JPEG", (200, 0, 0))
    (tmp_path / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t0\t63\t63\nval_1.JPEG\tn01\t0\t0\t63\t63\n"
    )
    return tmp_path


def test_tiny_imagenet(tiny: Path):
    split = tiny_imagenet(tiny, threads=2)
    assert split.train.pixels.shape == (3, 3, 64, 64) and split.train.classes == 2
    assert split.train.labels.tolist() == [0, 0, 1] and split.test.labels.tolist() == [1, 0]
    means = split.train.pixels.float().mean((2, 3))
    expected = torch.tensor([[200.0, 0, 0], [90, 90, 90], [0, 0, 200]])
    torch.testing.assert_close(means, expected, rtol=0, atol=4)  # JPEG loses a little
    assert split.test.pixels[0, 2].float().mean() > 190


def test_missing_and_damaged_parts_of_tiny_imagenet_are_named(tiny: Path):
    with pytest.raises(DataError, match="wnids.txt: there is no such.*cs231n"):
        tiny_imagenet(tiny / "train")
    picture(tiny / "train/n01/images/n01_2.JPEG", 3, size=(32, 64))
    with pytest.raises(DataError, match="n01_2.JPEG: expected 64 x 64"):
        tiny_imagenet(tiny)
    path = tiny / "train/n01/images/n01_2.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="n01_2.JPEG: damaged"):
        tiny_imagenet(tiny)
    path.unlink()
    (tiny / "val/val_annotations.txt").write_text("val_0.JPEG\tn03\n")
    with pytest.raises(DataError, match="val_annotations.txt: damaged"):
        tiny_imagenet(tiny)
    (tiny / "train/n02/images/n02_0.JPEG").unlink()
    with pytest.raises(DataError, match="n02/images: there are no"):
        tiny_imagenet(tiny)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("n02", 2), ("n01", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (40 + 10 * i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.JPEG", "JPEG")
    return tmp_path


def test_image_folder(folder: Path):
    data = ImageFolder(folder, side=16)
    assert (len(data), data.classes, data.names) == (5, 2, ["n01", "n02"])
    assert [data[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
    assert data[0][0].shape == (3, 16, 16) and data[0][0].dtype == torch.uint8
    middle = decode_image(folder / "n01/0.JPEG", "", 16)
    assert torch.equal(data[0][0], middle)
    drawn = [data[0, draw][0] for draw in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], middle)


def test_keys_decide_whatever_the_workers(folder: Path):
    data = ImageFolder(folder, side=8)

    def passes(workers: int) -> list[torch.Tensor]:
        keys = Shuffled(len(data), Generator().manual_seed(5))
        loader = DataLoader(data, batch_size=2, sampler=keys, num_workers=workers)
        return [torch.cat([x.flatten(1).float() for x, _ in loader]) for _ in range(2)]

    first, second = passes(0)
    assert first.shape == (5, 192) and not torch.equal(first, second)
    for once, again in zip((first, second), passes(1), strict=True):
        assert torch.equal(once, again)
    keys = list(Shuffled(5, Generator().manual_seed(0)))
    assert sorted(i for i, _ in keys) == list(range(5)) and len({d for _, d in keys}) == 5


def test_folders_without_pictures_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no: there is no such.*image-net.org"):
        ImageFolder(tmp_path / "no")
    with pytest.raises(DataError, match="no class folders"):
        ImageFolder(tmp_path)
    (tmp_path / "n01").mkdir()
    with pytest.raises(DataError, match="n01: there are no pictures"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("size", [(50, 40), (500, 40), (40, 500), (1, 1)])
def test_random_boxes_lie_inside_and_have_the_area_and_ratio(size: tuple[int, int]):
    width, height = size
    generator = Generator().manual_seed(0)
    areas = []
    for _ in range(300):
        left, top, right, bottom = random_box(width, height, generator)
        assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
        assert 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
        areas.append((right - left) * (bottom - top) / (width * height))
    if size == (50, 40):
        assert min(areas) < 0.12 and max(areas) > 0.9
        assert all(area >= 0.08 - 1e-9 for area in areas)


def test_the_central_box_shows_what_resizing_and_cutting_shows():
    # 512 x 256: the central 224 x 224 of the picture itself.
    assert central_box(512, 256) == (144, 16, 368, 240)
    gradient = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 512, 3))
    cut = Image.fromarray(np.ascontiguousarray(gradient)).resize(
        (224, 224), Image.Resampling.BILINEAR, box=central_box(512, 256)
    )
    assert np.array_equal(np.array(cut), gradient[16:240, 144:368])
