"""benchmarks/ablation.py: its methods train, and the page shows its numbers."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    yield ablation
    ablation.images.cache_clear()
    sys.modules.pop("ablation")


def test_the_page_shows_the_table_of_its_numbers(ablation):
    page = ablation.PAGE.read_text()
    assert page.split(ablation.BEGIN)[1].split(ablation.END)[0].strip() == ablation.section()


def test_methods_train(ablation, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12_000, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (12_000,), generator=generator)
    torch.save((pixels, labels), tmp_path / "data.pt")
    monkeypatch.setenv("ABLATION_DATA", str(tmp_path / "data.pt"))
    monkeypatch.setattr(ablation, "STEPS", 2)
    for name in ("SGDM", "defaults", "wide: one-sided", "LLQR defaults"):
        result = ablation.run(name, 0.01, 0)
        assert 0 < result["loss"] < 100
        assert result["refreshes"] == (name != "SGDM")
