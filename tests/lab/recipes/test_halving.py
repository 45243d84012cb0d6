"""Successive halving: the draws, the rungs, and a search that was killed."""

import math
from collections import Counter

import pytest

from llqr_lab.demo import search as demo_search
from llqr_lab.demo.search import INNER_RATES, RUNGS, SPACES
from llqr_lab.recipes.halving import Journal, draw_configurations


def test_configurations_are_a_latin_hypercube():
    count = 12
    rows = draw_configurations(SPACES["LLQR+SAM"], count)
    low, high = SPACES["LLQR+SAM"]["lr"]["log"]
    shares = [
        count * math.log(row["lr"] / low) / math.log(high / low) for row in rows
    ]  # each in a share of its own, up to rounding to three digits
    assert [round(s - 0.5) for s in sorted(shares)] == list(range(count))
    assert rows == draw_configurations(SPACES["LLQR+SAM"], count)


def test_every_structure_is_tried_at_every_rate():
    rows = draw_configurations(SPACES["LLQR+SAM"], RUNGS[0][0])
    pairs = Counter((row["structure"], row["inner_lr"]) for row in rows)
    assert set(pairs) == {(s, rate) for s, rates in INNER_RATES.items() for rate in rates}
    assert set(pairs.values()) == {RUNGS[0][0] // len(pairs)}
    assert "geometry" not in rows[0]


def test_methods_share_draws():
    sam, both = (draw_configurations(SPACES[name], 30) for name in ("SAM", "LLQR+SAM"))
    assert all(a.items() <= b.items() for a, b in zip(sam, both, strict=True))


def test_halving_keeps_the_best_and_uses_new_seeds(monkeypatch):
    """On a known objective: accuracy is the learning rate, times 100."""
    seen = []

    def known(trial):
        seen.append((trial.method, trial.settings["base.lr"], trial.seed))
        return {"accuracy": 100 * trial.settings["base.lr"]}

    monkeypatch.setattr(demo_search, "run_demo_trial", known)
    rungs = [(6, 1), (3, 2), (1, 1)]
    found = demo_search.search_demo(["SGDM", "SAM"], rungs, epochs=1, workers=1)
    assert found["search"]["runs_a_method"] == 6 + 3 * 2 + 1
    for name, entry in found["methods"].items():
        rates = sorted((s["lr"] for s in draw_configurations(SPACES[name], 6)), reverse=True)
        assert entry["settings"]["lr"] == rates[0]
        assert entry["validation_accuracy"] == pytest.approx(100 * rates[0], abs=1e-3)
        own = [(lr, seed) for method, lr, seed in seen if method == name]
        assert len(own) == len(set(own)) == 13
        expected = {(lr, 1000) for lr in rates}
        expected |= {(lr, seed) for lr in rates[:3] for seed in (1001, 1002)} | {(rates[0], 1003)}
        assert set(own) == expected


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch):
    path, seen = tmp_path / "settings.json.journal", []

    def failing_at(stop):
        def run(trial):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append((trial.method, trial.settings["base.lr"], trial.seed))
            return {"accuracy": 100 * trial.settings["base.lr"]}

        return run

    def found(journal, stop=None):
        monkeypatch.setattr(demo_search, "run_demo_trial", failing_at(stop))
        return demo_search.search_demo(["SGDM", "SAM"], [(4, 1), (2, 2)], 1, 1, journal)

    for stop in (3, 10):
        with pytest.raises(KeyboardInterrupt):
            found(path, stop)
        with path.open("a") as file:
            file.write('["half a line')
    whole = found(path)
    assert len(seen) == len(set(seen)) == 2 * (4 + 2 * 2)
    seen.clear()
    assert whole["methods"] == found(None)["methods"]
    with pytest.raises(ValueError, match="is of another search"):
        Journal(path, {"experiment": "demo", "train.epochs": 2})
