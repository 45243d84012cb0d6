"""The rehearsal: made-up data that the readers take, cells, limits, and what a table says."""

import json
import os
import time
from pathlib import Path

import pytest

from llqr_lab.common.limited_process import Limits, run_in_process
from llqr_lab.data.cifar import cifar10, cifar100
from llqr_lab.data.fashion_mnist import fashion_mnist
from llqr_lab.data.image_folder import ImageFolder
from llqr_lab.data.iwslt14 import iwslt14_raw, iwslt14_tokenised
from llqr_lab.data.libreoffice import libreoffice_help
from llqr_lab.data.made_up import FORMATS, SIZES, made_up_data
from llqr_lab.data.tiny_imagenet import tiny_imagenet
from llqr_lab.data.vocabulary import Words
from llqr_lab.recipes import rehearse
from llqr_lab.recipes.config import RECIPES
from llqr_lab.recipes.rehearse import Cell, Sizes, cells_of, rehearse_cell, representatives_of

linux = pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs fork and its resource usage")


@pytest.mark.parametrize("name", FORMATS)
def test_the_readers_take_made_up_data(tmp_path: Path, name: str):
    home = made_up_data(name, tmp_path)
    read = {
        "cifar-10": (cifar10, 10, 80),
        "cifar-100": (cifar100, 100, 16),
        "tinyimagenet-200": (tiny_imagenet, 200, 200),
        "fashion-mnist": (fashion_mnist, 10, 16),
    }
    if name in read:
        reader, classes, count = read[name]
        split = reader(home)
        assert (split.train.classes, len(split.train)) == (classes, count) and len(split.test)
    elif name == "imagenet":
        for part in ("train", "val"):
            folder = ImageFolder(home / part)
            assert folder.classes == len(folder) == 1000 and folder[0][0].shape == (3, 224, 224)
    elif name == "help-texts":
        assert len(libreoffice_help(home).train) > 10
    else:
        pairs = (iwslt14_raw if name.endswith("raw") else iwslt14_tokenised)(home)
        assert pairs.valid and pairs.test
        if name == "iwslt14":  # vocabularies of the real sizes
            for side, language in enumerate(("de", "en")):
                assert len(Words(pair[side] for pair in pairs.train)) == SIZES[language]
    assert made_up_data(name, tmp_path) == home  # not written again


def test_every_cell_runs_or_has_one_that_runs_for_it():
    cells = list(cells_of(RECIPES))
    runs_as = representatives_of(cells)
    assert set(runs_as) == set(cells)
    for cell, one in runs_as.items():
        assert cell.network == one.network and runs_as[one] == one
        if "LLQR" not in cell.method and "NG" not in cell.method:
            assert one == cell  # seconds: it runs itself
        elif cell.recipe in ("table1", "table10"):
            assert "SAM" in one.method and ("Newton" in cell.method) == ("Newton" in one.method)
    assert {cell.read for cell in cells} == {"", "iwslt14-raw"}


SAMPLE = [
    (Cell("table1", "CIFAR-10", "resnet18", "LLQR+SAM (Newton)"), ["network.width=8"]),
    (Cell("table4", "CIFAR-100", "pyramidnet-110", "LLQR+F-SAM (NGD)"), ["network.alpha=9"]),
    (Cell("table6", "IWSLT14", "transformer-iwslt", "SAM"), ["network.layers=1"]),
    (Cell("figure6", "ImageNet-scale images", "vit-ti16", "LLQR (NGD)"), ["network.depth=1"]),
]


@pytest.mark.parametrize("cell, smaller", SAMPLE, ids=lambda v: getattr(v, "network", ""))
def test_a_sample_on_small_networks(tmp_path: Path, cell: Cell, smaller: list[str]):
    found = rehearse_cell(cell, Sizes(batch=2, inner_steps=1, changes=tuple(smaller)), tmp_path)
    assert found["parameters"] > 0 and found["skipped"] == 0
    assert ("accepted" in found) == ("LLQR" in cell.method)
    json.dumps(found, allow_nan=False)


@linux
def test_a_journal_is_gone_on_with_and_a_failure_does_not_end_the_rest(tmp_path, monkeypatch):
    ran = []

    def answer(function, limits: Limits):
        (cell, *_), number = function.args, len(ran)
        ran.append(cell.key)
        took = {"seconds": 2.0, "peak_gib": 0.5}
        if number == 0:
            return {"error": "ValueError: made up", **took}
        if number == 1:
            return {"stopped": "above 12 GiB", **took}
        learned = {"accepted": False, "reason": "J is not finite"} if "LLQR" in cell.key else {}
        return {**learned, "skipped": 0, **took}

    monkeypatch.setattr(rehearse, "run_in_process", answer)
    words = ["--recipes", "table7", "table2", "--networks", "resnet18", "--out", str(tmp_path)]
    assert rehearse.main(words) == 1
    count = len(ran)  # table 7's FisherSAM, and table 2's five without or with another geometry
    assert count == 6
    assert rehearse.main(words) == 1 and len(ran) == count  # all are in the journal
    table = (tmp_path / "rehearsal.md").read_text()
    more = [*words[:3], "table1", *words[3:]]
    assert rehearse.main([*more, "--table"]) == 1 and len(ran) == count  # table 1's are missing
    assert (tmp_path / "rehearsal.md").read_text().count("\n") >= table.count("\n")
    assert "failed: ValueError: made up" in table and "stopped: above 12 GiB" in table
    assert "refused: J is not finite" in table and "not run: see table" in table
    with pytest.raises(ValueError, match="journal: .* is of another search"):
        rehearse.main([*words, "--batch", "2"])


@linux
def test_a_process_is_measured_and_ended_at_its_limits():
    limits = Limits(seconds=20, gib=4.0)

    def busy():
        began = time.process_time()
        while time.process_time() - began < 0.2:
            pass
        return {"answer": 1}

    found = run_in_process(busy, limits)
    assert found["answer"] == 1 and found["seconds"] >= 0.1 and found["peak_gib"] > 0.05
    assert run_in_process(lambda: 1 / 0, limits)["error"] == "ZeroDivisionError: division by zero"
    assert run_in_process(lambda: bytearray(8 << 30), limits)["stopped"] == "above 4 GiB"

    def endless():
        while True:
            pass

    found = run_in_process(endless, Limits(seconds=1, gib=4.0))
    assert found["stopped"] == "above 1 s"


def test_the_help_teaches_and_an_empty_choice_is_told(capsys):
    with pytest.raises(SystemExit):
        rehearse.main(["--help"])
    shown = capsys.readouterr().out
    assert "two steps with one refresh" in shown and "--limit-seconds" in shown
    with pytest.raises(SystemExit):
        rehearse.main(["--recipes", "table1", "--methods", "adam"])
    assert "no cell has this" in capsys.readouterr().err
    assert rehearse.main(["--recipes", "table7", "--list"]) == 0
    assert "table7/cifar-100/resnet18/LLQR^Delta+SAM" in capsys.readouterr().out
