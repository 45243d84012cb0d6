"""The search for the demo's settings, and its file that the package holds."""

import json

import pytest

from llqr_lab.demo import search as demo_search
from llqr_lab.demo.runs import SETTINGS_FILE
from llqr_lab.demo.search import RUNGS, SPACES
from llqr_lab.protocols import DEMO_METHODS
from llqr_lab.recipes.halving import FIRST_SEED, draw_configurations

RECORDED = json.loads(SETTINGS_FILE.read_text())


def test_a_run_of_the_search_looks_at_held_out_pictures(monkeypatch):
    """Never at the demo's test pictures."""
    from llqr_lab.recipes import run as recipe_run

    seen = []

    def looking(config, workers, records, about):
        seen.append((config.input.holdout, config.train.epochs, records.folder))
        return {"last": 12.3456, "refreshes": []}

    monkeypatch.setattr(recipe_run, "measure_run", looking)
    trial = demo_search.make_trial("SAM", {"lr": 0.1, "rho": 0.2}, 1000, epochs=7)
    assert (trial.method, trial.settings) == ("SAM", {"base.lr": 0.1, "probe.rho": 0.2})
    assert demo_search.run_demo_trial(trial) == {"accuracy": 12.346}
    assert seen == [(297, 7, None)]


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
