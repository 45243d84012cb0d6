"""The search for settings, and the demo's file of it that the package holds."""

import json
import math
from collections import Counter

import pytest

from llqr_lab.demo import search as demo_search
from llqr_lab.demo.runs import SETTINGS_FILE
from llqr_lab.demo.search import INNER_RATES, RUNGS, SPACES
from llqr_lab.protocols import DEMO_METHODS
from llqr_lab.protocols.own import TUNED
from llqr_lab.recipes import search
from llqr_lab.recipes.halving import FIRST_SEED, Journal, draw_configurations

RECORDED = json.loads(SETTINGS_FILE.read_text())


def test_configurations_are_a_latin_hypercube():
    count = 12
    rows = draw_configurations(SPACES["LLQR+SAM"], count)
    low, high = SPACES["LLQR+SAM"]["lr"]["log"]
    shares = [
        count * math.log(row["lr"] / low) / math.log(high / low) for row in rows
    ]  # each in a share of its own, up to rounding to three digits
    assert [round(s - 0.5) for s in sorted(shares)] == list(range(count))
    for choice in (10, 30, 100):
        assert sum(row["every"] == choice for row in rows) == count // 3
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

    def known(task):
        seen.append((task.method, task.settings["base.lr"], task.seed))
        return {"accuracy": 100 * task.settings["base.lr"]}

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


def test_a_run_that_fails_is_the_worst():
    trial = search.Trial("demo", "SGDM", {"base.lr": 0.1}, 1000, {"train.precision": "float16"})
    found = search.run_trial(trial)
    assert found["metric"] == 0.0
    assert found["error"].startswith("ValueError: train.precision: expected float32 or bfloat16")


def test_a_run_of_the_search_looks_at_held_out_pictures(monkeypatch):
    """Never at the demo's test pictures."""
    from llqr_lab.recipes import run as recipe_run

    seen = []

    def looking(config, workers, records, about):
        seen.append((config.input.holdout, config.train.epochs, records.folder))
        return {"last": 12.3456, "refreshes": []}

    monkeypatch.setattr(recipe_run, "measure_run", looking)
    task = demo_search.make_trial("SAM", {"lr": 0.1, "rho": 0.2}, 1000, epochs=7)
    assert (task.method, task.settings) == ("SAM", {"base.lr": 0.1, "probe.rho": 0.2})
    assert demo_search.run_demo_trial(task) == {"accuracy": 12.346}
    assert seen == [(297, 7, None)]


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch):
    path, seen = tmp_path / "settings.json.journal", []

    def failing_at(stop):
        def run(task):
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append((task.method, task.settings["base.lr"], task.seed))
            return {"accuracy": 100 * task.settings["base.lr"]}

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


@pytest.mark.parametrize("experiment", search.SPACES)
def test_recorded_settings_of_the_other_searches_are_in_their_spaces(experiment):
    recorded = json.loads((TUNED / f"{experiment}.json").read_text())
    count = recorded["search"]["rungs"][0]["configurations"]
    assert set(recorded["methods"]) == set(search.SPACES[experiment])
    for name, entry in recorded["methods"].items():
        assert entry["space"] == search.SPACES[experiment][name]
        tried = [trial["settings"] for trial in entry["trials"]]
        assert all(s in tried for s in draw_configurations(entry["space"], count))
        assert entry["settings"] == tried[0]


def form(value):
    """Return the keys and types of nested data; of a list, those that its entries have."""
    if isinstance(value, dict):
        return {key: form(v) for key, v in value.items()}
    return type(value)


def test_the_recorded_file_has_the_form_that_the_search_writes(tmp_path, capsys):
    path = tmp_path / "new" / "settings.json"
    arguments = ["--rungs", "2x1,1x1", "--epochs", "1", "--workers", "1", "--out", str(path)]
    assert demo_search.main(arguments) == 0
    assert str(path) in capsys.readouterr().out
    assert [*path.parent.iterdir()] == [path]
    written = json.loads(path.read_text())
    assert form(written) == form(RECORDED)
    assert list(written["methods"]) == list(RECORDED["methods"]) == list(DEMO_METHODS)


def test_the_recorded_search_had_equal_budgets_apart_from_the_demos_seeds():
    search = RECORDED["search"]
    assert search["rungs"] == [{"configurations": c, "seeds": s} for c, s in RUNGS]
    for entry in RECORDED["methods"].values():
        runs = [r for trial in entry["trials"] for r in trial["runs"]]
        assert len(runs) == search["runs_a_method"]
        assert {r["seed"] for r in runs} == set(range(FIRST_SEED, search["seeds"][1] + 1))


@pytest.mark.parametrize("name", DEMO_METHODS)
def test_recorded_settings_are_the_best_of_their_trials(name):
    entry = RECORDED["methods"][name]
    tried = [trial["settings"] for trial in entry["trials"]]
    for settings in draw_configurations(SPACES[name], RUNGS[0][0]):
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
        demo_search.main(["--rungs", text])
    assert "--rungs" in capsys.readouterr().err
