"""llqr run: every family in seconds, what it leaves, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llqr_lab.cli import main
from llqr_lab.protocols import METHODS, slug
from llqr_lab.recipes.config import RECIPES

FAMILIES = {
    "table1": ("vgg16-bn", "llqr-sam"),
    "table2": ("wrn-28-10", "llqr-newton"),
    "table3": ("resnet18", "llqr-sam-newton"),
    "table4": ("pyramidnet-110", "llqr-f-sam"),
    "table5": ("resnet50", "f-sam"),
    "table6": ("transformer-iwslt", "llqr-sam"),
    "table7": ("resnet18", "llqr-delta-sam"),
    "table8": ("resnet18", "adam"),
    "table10": ("vit-b16", "llqr-sam"),
    "figure6": ("vit-ti16", "llqr"),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(recipe, *overrides, scale="smoke"):
        status = main(["run", recipe, f"scale={scale}", "tracker=none", "out=o", *overrides])
        return status, [json.loads(p.read_text()) for p in sorted(tmp_path.rglob("result.json"))]

    return run


def test_every_recipe_of_the_paper_is_tried_here():
    assert set(FAMILIES) == {name for name in RECIPES if name[-1].isdigit()}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_smoke_run_of_each_family(run, tmp_path, recipe):
    model, method = FAMILIES[recipe]
    status, results = run(recipe, f"model={model}", f"method={method}")
    assert status == 0
    (result,) = results
    assert (result["recipe"], result["model"], result["seed"]) == (recipe, model, 0)
    assert slug(result["method"]) == method and result["changed"] == []
    assert result["skipped_steps"] == 0 and result["parameters"] > 0
    assert (
        len(result["data"]["digest"]) == 16
        and "pixels" in result["data"]["preparation"]
        or ("pairs, raw text, joint BPE" in result["data"]["preparation"])
    )
    if recipe in ("table10", "figure6"):
        assert result["timing"]["epoch_seconds"] > 0 and result["timing"]["updates"] >= 2
        return
    assert [e["epoch"] for e in result["epochs"]] == [1, 2]
    assert result["best"] == max(e[result["metric"]] for e in result["epochs"])
    steps = result["epochs"][-1]["step"]
    learns = METHODS[result["method"]].curvature is not None
    refreshed = [r["step"] for r in result["refreshes"]]
    assert refreshed == (list(range(0, steps, 2)) if learns else [])
    assert (tmp_path / "o").exists() and not list(tmp_path.rglob("checkpoint.pt*"))
    lines = [json.loads(x) for x in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "refresh"] == refreshed
    assert [x["epoch"] for x in lines if x["kind"] == "epoch"] == [1, 2]


def test_multirun_makes_every_combination(run):
    status, results = run("table1", "--multirun", "method=sgdm,sam", "seed=0,1")
    assert status == 0
    assert sorted((r["method"], r["seed"]) for r in results) == [
        ("SAM", 0),
        ("SAM", 1),
        ("SGDM", 0),
        ("SGDM", 1),
    ]


def test_noise_and_own_settings_have_folders_of_their_own(run, tmp_path):
    run("table8", "method=sgdm", "noise=0.2")
    run("table8", "method=sgdm", "noise=0.6")
    _, results = run("table8", "method=sgdm", "noise=0.6", "base.weight_decay=0.01")
    assert sorted((r["noise"], *r["changed"]) for r in results) == [
        (0.2,),
        (0.6,),
        (0.6, "base.weight_decay"),
    ]


def test_what_is_finished_is_not_run_again(run, capsys):
    _, (before,) = run("table1")
    _, (after,) = run("table1")
    assert after == before and "finished before" in capsys.readouterr().out
    _, (again,) = run("table1", "force=true")
    assert again["epochs"][0]["seconds"] != before["epochs"][0]["seconds"]
    for epochs in (before["epochs"], again["epochs"]):
        for epoch in epochs:
            assert epoch.pop("seconds") < epoch.pop("elapsed_seconds")
            del epoch["processor_seconds"]
    assert again["epochs"] == before["epochs"]


def test_methods_of_a_seed_start_from_the_same_network_and_see_the_same_batches(run):
    _, results = run("table1", "--multirun", "method=sgdm,fishersam", "base.lr=0", "train.epochs=1")
    sgdm, sam = results
    assert sgdm["epochs"][0]["train_loss"] == sam["epochs"][0]["train_loss"]


def test_bfloat16_trains(run):
    _, (result,) = run("table1", "method=llqr-sam", "train.precision=bfloat16")
    assert result["skipped_steps"] == 0 and all(r["accepted"] for r in result["refreshes"])


def test_pictures_are_decoded_from_folders(run, tmp_path, capfd):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    status, (result,) = run(
        "table5",
        "method=llqr",
        "read=imagenet",
        f"data={tmp_path / 'pictures'}",
        "input.image=32",
        "train.batch=4",
        "workers=0",
    )
    assert status == 0 and result["source"] == "imagenet"
    assert [e["step"] for e in result["epochs"]] == [2, 4]
    place = f"data={tmp_path / 'pictures'}"
    status, _ = run("table5", place, "workers=0", scale="paper")
    assert status != 0 and "train has 2 class folders, ImageNet 1,000" in capfd.readouterr().err
    (tmp_path / "pictures" / "val" / "dog").rename(tmp_path / "pictures" / "val" / "fox")
    status, _ = run("table5", place, "read=imagenet", "workers=0", "force=true")
    assert status != 0 and "val differ" in capfd.readouterr().err
    assert result["epochs"][-1]["test_accuracy"] in (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["scale=paper"], "data: cifar-10 needs data=FOLDER"),
        (["scale=tiny"], "^llqr: scale: table1 has paper, small, smoke, got 'tiny'$"),
        (["seed=abc"], "seed: expected an integer, got 'abc'"),
        (["read=mnist"], "read: expected one of digits, .*, got 'mnist'"),
        (["input.holdout=5000"], "input.holdout: expected 1 .. 1296, got 5000"),
        (["train.precision=float16"], "train.precision: expected float32 or bfloat16"),
        (["train.schedule=linear"], "train.schedule: expected cosine, .*, got 'linear'"),
    ],
)
def test_errors_say_what_is_expected(run, capfd, overrides, message):
    import re

    status, results = run("table1", *overrides)
    assert status != 0 and not results
    assert re.search(message, capfd.readouterr().err, re.MULTILINE)


def test_what_cannot_begin_leaves_no_folder(run):
    status, _ = run("table1", scale="paper")
    assert status != 0 and not Path("o").exists()


def test_an_unknown_recipe_is_answered_with_the_known(capsys):
    assert main(["run", "table9"]) == 2
    assert "table1, table2" in capsys.readouterr().err


def test_a_folder_with_another_run_is_refused(run, tmp_path, capfd):
    run("table1")
    path = next(tmp_path.rglob("result.json"))
    result = json.loads(path.read_text())
    result["settings"]["base.lr"] = 1.0
    path.write_text(json.dumps(result))
    status, _ = run("table1")
    assert status != 0 and "holds a finished run with other settings" in capfd.readouterr().err


def test_the_list_names_every_recipe(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in RECIPES) and "llqr-f-sam-newton" in shown
