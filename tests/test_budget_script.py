"""benchmarks/budget.py: all methods run, the tables are right, and the page shows them."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import budget

    yield budget
    budget.data.cache_clear()
    for name in ("budget", "ablation"):
        sys.modules.pop(name)


def test_the_page_shows_the_tables_of_its_numbers(budget):
    page = budget.PAGE.read_text()
    assert page.split(budget.BEGIN)[1].split(budget.END)[0].strip() == budget.section()


def test_every_method_trains_on_the_same_images(budget, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        return pixels, torch.randint(10, (count,), generator=generator)

    torch.save({"train": draw(12_000), "test": draw(500)}, tmp_path / "data.pt")
    monkeypatch.setenv("BUDGET_DATA", str(tmp_path / "data.pt"))
    for method in budget.METHODS:
        settings = budget.settings_of(0.3, method)
        assert len(set(settings)) == 9
        trainings = [budget.Training(settings[0], seed, 2) for seed in (0, 0, 1)]
        for training in trainings:
            training.step()
        first, again, other = (t.model[0].weight for t in trainings)
        assert torch.equal(first, again) and not torch.equal(first, other)
    (x, y), (x_right, y_right) = (budget.training_images(noise, 0) for noise in (0.3, 0.0))
    assert torch.equal(x, x_right)
    assert float((y != y_right).float().mean()) == pytest.approx(0.3, abs=0.03)


def results(accuracies):
    runs = {m: [{"seed": i, "accuracy": a} for i, a in enumerate(v)] for m, v in accuracies.items()}
    return {
        "budget": 6.0,
        "seeds": 3,
        "workers": 1,
        "processor": "p",
        "torch": "t",
        "seconds per step": dict.fromkeys(accuracies, 0.0123),
        "steps": dict.fromkeys(accuracies, 7),
        "rows": [
            {"noise": noise, "method": m, "lr": 0.1, "rho": 0.1 if "SAM" in m else None, "runs": r}
            for noise in (0.0, 0.3)
            for m, r in runs.items()
        ],
    }


def test_tables_compare_at_equal_seeds_and_go_into_the_page(budget, monkeypatch, tmp_path):
    found = results({"SGDM": [81, 81.5, 84], "SAM": [82, 83, 84.5], "MSAM": [81, 82, 83.4]})
    text = budget.tables(found)
    # SGDM - SAM: -1, -1.5, -0.5; MSAM - SAM: -1, -1, -1.1, whose standard error is 0.1 / 3.
    assert "| SGDM | 12.3 | 7 | 0.1 |  | 82.17 +- 1.61 | -1.00 +- 0.29 |" in text
    assert "| SAM | 12.3 | 7 | 0.1 | 0.1 (end) | 83.17 +- 1.26 |  |" in text
    assert "| MSAM | 12.3 | 7 | 0.1 | 0.1 (end) | 82.13 +- 1.21 | -1.03 +- 0.03 |" in text
    assert text.count("three standard errors: SGDM, MSAM worse than SAM.") == 2
    page, numbers = tmp_path / "page.md", tmp_path / "budget.json"
    page.write_text(f"before\n{budget.BEGIN}\nold\n{budget.END}\nafter\n")
    numbers.write_text(json.dumps(found))
    monkeypatch.setattr(budget, "PAGE", page)
    budget.write_page(numbers)
    assert page.read_text() == f"before\n{budget.BEGIN}\n\n{text}\n\n{budget.END}\nafter\n"
