"""The search for the demo's settings, and the file of it that the package holds."""

import json
import math
from collections import Counter

import pytest

from llqr_lab import search_demo
from llqr_lab.halving import FIRST_SEED, configurations
from llqr_lab.methods import METHODS
from llqr_lab.search_demo import INNER_RATES, RUNGS, SETTINGS_FILE, SPACES

RECORDED = json.loads(SETTINGS_FILE.read_text())


def test_configurations_are_a_latin_hypercube():
    count = 12
    rows = configurations(SPACES["LLQR+SAM"], count)
    low, high = SPACES["LLQR+SAM"]["lr"]["log"]
    shares = [
        count * math.log(row["lr"] / low) / math.log(high / low) for row in rows
    ]  # each in a share of its own, up to rounding to three digits
    assert [round(s - 0.5) for s in sorted(shares)] == list(range(count))
    for choice in (10, 30, 100):
        assert sum(row["every"] == choice for row in rows) == count // 3
    assert rows == configurations(SPACES["LLQR+SAM"], count)


def test_every_structure_is_tried_at_every_rate():
    rows = configurations(SPACES["LLQR+SAM"], RUNGS[0][0])
    pairs = Counter((row["structure"], row["inner_lr"]) for row in rows)
    assert set(pairs) == {(s, rate) for s, rates in INNER_RATES.items() for rate in rates}
    assert set(pairs.values()) == {RUNGS[0][0] // len(pairs)}
    assert "geometry" not in rows[0]


def test_methods_share_draws():
    sam, both = (configurations(SPACES[name], 30) for name in ("SAM", "LLQR+SAM"))
    assert all(a.items() <= b.items() for a, b in zip(sam, both, strict=True))


def test_halving_keeps_the_best_and_uses_new_seeds(monkeypatch):
    """On a known objective: accuracy is the learning rate, times 100."""
    seen = []

    def known(task):
        seen.append((task.method, task.settings["lr"], task.seed, task.validation))
        return {"accuracy": 100 * task.settings["lr"]}

    monkeypatch.setattr(search_demo, "_trial", known)
    found = search_demo.search(["SGDM", "SAM"], [(6, 1), (3, 2), (1, 1)], epochs=1, workers=1)
    assert found["search"]["runs_a_method"] == 6 + 3 * 2 + 1
    for name, entry in found["methods"].items():
        rates = sorted((s["lr"] for s in configurations(SPACES[name], 6)), reverse=True)
        assert entry["settings"]["lr"] == rates[0]
        assert entry["validation_accuracy"] == pytest.approx(100 * rates[0], abs=1e-3)
        own = [(lr, seed) for method, lr, seed, _ in seen if method == name]
        assert len(own) == len(set(own)) == 13
        expected = {(lr, 1000) for lr in rates}
        expected |= {(lr, seed) for lr in rates[:3] for seed in (1001, 1002)} | {(rates[0], 1003)}
        assert set(own) == expected
    assert all(validation for *_, validation in seen)


def test_a_run_that_fails_is_the_worst(monkeypatch):
    def broken(task):
        raise RuntimeError("no")

    monkeypatch.setattr(search_demo, "run", broken)
    assert search_demo._trial(None) == {"accuracy": 0.0, "error": "RuntimeError: no"}


def form(value):
    """Return the keys and types of nested data; of a list, those that its entries have."""
    if isinstance(value, dict):
        return {key: form(v) for key, v in value.items()}
    return type(value)


def test_the_recorded_file_has_the_form_that_the_search_writes(tmp_path, capsys):
    path = tmp_path / "new" / "settings.json"
    arguments = ["--rungs", "2x1,1x1", "--epochs", "1", "--workers", "1", "--out", str(path)]
    assert search_demo.main(arguments) == 0
    assert str(path) in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert form(written) == form(RECORDED)
    assert list(written["methods"]) == list(RECORDED["methods"]) == list(METHODS)


def test_the_recorded_search_had_equal_budgets_apart_from_the_demos_seeds():
    search = RECORDED["search"]
    assert search["rungs"] == [{"configurations": c, "seeds": s} for c, s in RUNGS]
    for entry in RECORDED["methods"].values():
        runs = [r for trial in entry["trials"] for r in trial["runs"]]
        assert len(runs) == search["runs_a_method"]
        assert {r["seed"] for r in runs} == set(range(FIRST_SEED, search["seeds"][1] + 1))


@pytest.mark.parametrize("name", METHODS)
def test_recorded_settings_are_the_best_of_their_trials(name):
    entry = RECORDED["methods"][name]
    tried = [trial["settings"] for trial in entry["trials"]]
    for settings in configurations(SPACES[name], RUNGS[0][0]):
        assert settings in tried
    assert entry["space"] == SPACES[name]
    seeds = max(len(trial["runs"]) for trial in entry["trials"])
    finalists = [
        (sum(r["accuracy"] for r in trial["runs"]) / seeds, trial["settings"])
        for trial in entry["trials"]
        if len(trial["runs"]) == seeds
    ]
    assert len(finalists) == RUNGS[-1][0]
    best = max(mean for mean, _ in finalists)
    # Two may tie up to the digits that are recorded.
    assert entry["settings"] in [s for mean, s in finalists if mean > best - 1e-3]
    assert entry["validation_accuracy"] == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("text", ["4x1,8x1", "3", "3x0", "axb"])
def test_bad_rungs(text, capsys):
    with pytest.raises(SystemExit):
        search_demo.main(["--rungs", text])
    assert "--rungs" in capsys.readouterr().err
