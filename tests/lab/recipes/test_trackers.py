"""Trackers: every measurement of a run arrives, refreshes included; a missing one is a line."""

import json
import sys
import types

import pytest

import llqr_lab.recipes.trackers as trackers
from llqr_lab.cli import main
from llqr_lab.recipes.records import Records
from llqr_lab.recipes.trackers import TRACKERS, require_tracker


class FakeRun:
    """What wandb.init and trackio.init return."""

    def __init__(self, calls):
        self.calls = calls

    def log(self, numbers, step=None):
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append("finished")


def fake_package(name, calls):
    """A package with the calls of the real one that are made here."""
    package = types.ModuleType(name)
    package.__spec__ = types.SimpleNamespace(name=name)

    def init(**given):
        calls.append(given)
        return FakeRun(calls)

    def start_run(run_id=None, run_name=None):
        calls.append({"id": run_id, "name": run_name})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "made by mlflow"))

    package.init = init
    package.start_run = start_run
    package.set_experiment = lambda experiment: None
    package.log_params = lambda values: calls[-1].update(config=values)
    package.log_metrics = lambda numbers, step: calls.append((step, numbers))
    package.end_run = lambda: calls.append("finished")
    return package


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def tracker(request, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, request.param, fake_package(request.param, calls))
    return request.param, calls


def test_all_of_a_run_arrives_refreshes_included(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_package("wandb", calls))
    words = ["run", "table1", "method=llqr", "scale=smoke", "log_every=1", f"out={tmp_path}"]
    assert (
        main(
            [
                *words,
                "llqr.structure=diagonal",
                "train.epochs=1",
                "input.limit=100",
                "tracker=wandb",
            ]
        )
        == 0
    )
    began, *logged = calls
    assert logged.pop() == "finished"
    assert began["name"].startswith("table1/smoke/cifar-10/vgg16-bn/llqr/seed0")
    assert began["config"]["method"] == "LLQR (NGD)" and "base.lr" in began["config"]
    steps = [step for step, _ in logged]
    assert steps == sorted(steps)  # wandb drops what goes back
    (path,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert logged == [
        (
            line.pop("step"),
            {f"{kind}/{k}": v for k, v in line.items() if isinstance(v, (int, float))},
        )
        for line in lines
        if (kind := line.pop("kind"))
    ]
    sent = {key for _, numbers in logged for key in numbers}
    assert {"step/loss", "epoch/test_accuracy", "refresh/change", "refresh/accepted"} <= sent


def test_each_tracker_gets_plain_numbers_at_their_step(tracker, tmp_path):
    name, calls = tracker
    records = Records(tmp_path, tracker=name)
    records.begin_files({"recipe": "table1"})
    report = {"accepted": True, "change": 0.5, "reason": None}
    records.write_measurement("refresh", 7, report)
    records.close()
    assert calls[1:] == [(7, {"refresh/accepted": 1.0, "refresh/change": 0.5}), "finished"]
    assert all(type(value) is float for value in calls[1][1].values())


def test_a_killed_run_goes_on_in_the_same_place(tracker, tmp_path):
    name, calls = tracker

    def begun(step):
        records = Records(tmp_path / "a/b/c/d/e/seed0", tracker=name)
        records.begin_files({"recipe": "table1", "settings": {"base.lr": 0.1}}, step)
        records.close()
        given = calls[-2]
        return given.get("id") or given["name"], given["config"]

    first, config = begun(0)
    known = "made by mlflow" if name == "mlflow" else first
    assert begun(7)[0] == known and config == {"recipe": "table1", "base.lr": 0.1}
    if name != "mlflow":  # which names its runs itself
        assert begun(0)[0] != known  # force=true


def test_none_and_the_processes_that_do_not_write_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: pytest.fail("begun"))
    for options in ({"tracker": "none"}, {"tracker": "wandb", "writes": False}):
        records = Records(tmp_path, **options)
        records.begin_files({})
        records.write_measurement("step", 1, {"loss": 1.0})
        records.close()


def test_what_is_missing_or_misspelt_is_said_before_anything_is_computed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    words = ["run", "table1", "method=sgdm", "scale=smoke", f"out={tmp_path}"]
    for name in ("wandb", "trackio", "mlflow"):
        assert main([*words, f"tracker={name}"]) == 2
        said = capsys.readouterr().err
        assert said == f"llqr: {name} is not installed; pip install {name}\n"
    assert main([*words, "tracker=wandbb"]) == 2
    assert "expected one of tensorboard, wandb, trackio, mlflow, none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    require_tracker("none")
    assert set(TRACKERS) == {"tensorboard", "wandb", "trackio", "mlflow", "none"}
