"""Finding and reading runs: damaged ones are refused by name, unfinished ones never used."""

import json

import pytest

from lab.collect.made_up import run, timing
from llqr_lab.collect.runs import RunError, find_runs, read_result

ONE = ("table1", "CIFAR-10", "resnet18", "SGDM")


def test_runs_are_found_at_any_depth_and_unfinished_ones_apart(tmp_path):
    run(tmp_path, "a/b/c", *ONE, seed=0, best=90.0)
    run(tmp_path, "d", *ONE, seed=1, best=91.0)
    for folder, file in (
        ("going", "metrics.jsonl"),
        ("kept", "checkpoint.pt"),
        ("d", "metrics.jsonl"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text("{}")
    found = find_runs(tmp_path)
    assert [r["seed"] for r in found.runs] == [0, 1]
    assert found.unfinished == [tmp_path / "going", tmp_path / "kept"]
    assert find_runs(tmp_path / "nowhere").runs == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format: expected 1, got 2"),
        ({"scale": "huge"}, "scale: expected one of paper, small, smoke, got 'huge'"),
        ({"method": "Magic"}, "method: expected one of"),
        ({"seed": None}, "seed: expected int, got None"),
        ({"seed": True}, "seed: expected int, got True"),
        ({"settings": []}, r"settings: expected dict, got \[\]"),
        ({"epochs": []}, "epochs, best, last"),
    ],
)
def test_what_is_wrong_in_a_result_is_said_with_its_file(tmp_path, change, said):
    folder = run(tmp_path, "x", *ONE, seed=0, best=90.0)
    content = {**json.loads((folder / "result.json").read_text()), **change}
    (folder / "result.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=said) as caught:
        find_runs(tmp_path)
    assert str(folder / "result.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "rec', "[1, 2]", "null"])
def test_a_damaged_result_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(RunError, match="result.json"):
        read_result(tmp_path / "result.json")


def test_a_timing_needs_its_numbers(tmp_path):
    folder = timing(tmp_path, "t", "vit-b16", "LLQR (NGD)", 50, 10.0, 1.0)
    assert read_result(folder / "result.json").cell.every == 50
    content = json.loads((folder / "result.json").read_text())
    del content["timing"]["epoch_seconds_without"]
    (folder / "result.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="timing.epoch_seconds_without"):
        read_result(folder / "result.json")


def test_where_leaves_out_other_values_and_keeps_runs_without_the_setting(tmp_path):
    run(tmp_path, "0", *ONE, seed=0, best=90.0)
    run(tmp_path, "1", *ONE, seed=0, best=91.0, changes={"base.weight_decay": 1e-3})
    run(tmp_path, "2", "table1", "CIFAR-10", "resnet18", "SAM", seed=0, best=92.0)
    assert len(find_runs(tmp_path, ["base.weight_decay=0.001"]).runs) == 1
    found = find_runs(tmp_path, ["probe.rho=0.3"])
    assert [r["best"] for r in found.runs] == [90.0, 91.0]
    assert found.notes == ["1 runs were left out by --where probe.rho=0.3."]
    assert len(find_runs(tmp_path, ["recipe=table1"]).runs) == 3
    with pytest.raises(ValueError, match="no run has the setting 'base.wd'"):
        find_runs(tmp_path, ["base.wd=1"])
    with pytest.raises(ValueError, match="expected KEY=VALUE, got 'seed'"):
        find_runs(tmp_path, ["seed"])


def test_runs_on_held_out_data_are_no_test_results(tmp_path):
    run(tmp_path, "0", *ONE, seed=0, best=99.0, changes={"data.holdout": 5000})
    found = find_runs(tmp_path)
    assert not found.runs and "held out" in found.notes[0]
