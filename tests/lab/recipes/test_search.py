"""The search for settings of this project's own experiments, and its files."""

import json

import pytest

from llqr_lab.protocols.own import TUNED
from llqr_lab.recipes import run as recipe_run
from llqr_lab.recipes import search
from llqr_lab.recipes.halving import draw_configurations


def test_a_run_that_fails_is_the_worst(monkeypatch):
    trial = search.Trial("demo", "SGDM", {"base.lr": 0.1}, 1000, {"train.precision": "float16"})
    found = search.run_trial(trial)
    assert found["metric"] == 0.0
    assert found["error"].startswith("ValueError: train.precision: expected float32 or bfloat16")

    def broken(*arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(recipe_run, "measure_run", broken)
    sound = search.Trial("demo", "SGDM", {"base.lr": 0.1}, 1000, {})
    assert search.run_trial(sound) == {"metric": 0.0, "error": "RuntimeError: no"}


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
