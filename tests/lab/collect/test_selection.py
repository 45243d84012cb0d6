"""llqr select: the baseline's best weight decay for each row, and the table that uses it."""

import json
import re

import pytest

from lab.collect.made_up import run
from llqr_lab.cli import main
from llqr_lab.collect.runs import RunError, find_runs, read_selections
from llqr_lab.collect.tables import fill_table

ROW = ("table1", "CIFAR-10", "resnet18")
GRID = {1e-4: (95.0, 95.2), 5e-4: (95.1, 95.3), 1e-3: (96.0, 96.4)}


def grid(root, method="SGDM", scores=GRID, **options):
    for value, bests in scores.items():
        for seed, best in enumerate(bests):
            # 5e-4 is the protocol's here: it was not changed.
            changes = {"base.weight_decay": value} if value != 5e-4 else {}
            changes |= options.get("changes", {})
            name = f"{method}-{value}-{seed}"
            run(root, name, *ROW, method, seed, best, **{**options, "changes": changes})


def cell(table, method):
    row = next(r for r in table.rows if r["labels"] == ["ResNet-18"])
    return next(c for c in row["cells"] if c["method"] == method)


def test_the_best_of_the_grid_is_written_and_the_table_takes_it(tmp_path, capsys):
    grid(tmp_path)
    grid(tmp_path, "SAM", {5e-4: (90.0, 90.0), 1e-3: (97.0, 97.2)})
    assert main(["select", "table1", "--out", str(tmp_path)]) == 1  # other rows lack runs
    said = capsys.readouterr()
    assert "CIFAR-10, resnet18: 0.001 (SGDM at 0.0001: 95.10" in said.out
    assert "CIFAR-10, vgg16-bn: nothing chosen" in said.out
    assert "model=vgg16-bn method=sgdm base.weight_decay=0.0001 seed=0" in said.err
    further = "--multirun model=resnet18 method=llqr,llqr-newton,sam,fishersam,llqr-sam,"
    assert further in said.out and "base.weight_decay=0.001 seed=0,1 " in said.out
    content = json.loads((tmp_path / "selection-table1-paper.json").read_text())
    row = next(r for r in content["rows"] if r["model"] == "resnet18")
    assert row["chosen"] == 1e-3 and row["seeds"] == [0, 1] and "C.1" in content["rule"]
    assert [c["value"] for c in row["candidates"]] == [1e-4, 5e-4, 1e-3]
    table = fill_table("1", find_runs(tmp_path))
    assert cell(table, "SGDM")["mean"] == pytest.approx(96.2)
    sam = cell(table, "SAM")
    assert sam["mean"] == pytest.approx(97.1) and sam["changed"] == []
    assert sam["difference"] == pytest.approx(0.9)
    assert "base.weight_decay=0.001" in cell(table, "LLQR (NGD)")["command"]
    assert any("weight decay 0.001, selected by the baseline" in n for n in table.notes)
    assert any("6 runs have a weight decay that was not selected" in n for n in table.notes)
    # Who asks for a value gets it.
    plain = fill_table("1", find_runs(tmp_path, ["base.weight_decay=0.0005"]))
    assert cell(plain, "SAM")["mean"] == 90.0


def test_without_a_selection_the_protocols_runs_are_used(tmp_path):
    grid(tmp_path)
    assert cell(fill_table("1", find_runs(tmp_path)), "SGDM")["mean"] == pytest.approx(95.2)


def test_only_shared_seeds_count_and_a_gap_in_the_grid_chooses_nothing(tmp_path, capsys):
    grid(tmp_path, scores={1e-4: (96.0,), 5e-4: (95.0, 99.0), 1e-3: (94.0, 99.0)})
    main(["select", "table1", "--out", str(tmp_path)])
    assert "resnet18: 0.0001 (" in capsys.readouterr().out
    gap = tmp_path / "gap"
    grid(gap, scores={1e-4: (96.0,), 5e-4: (95.0,)})
    assert main(["select", "table1", "--runs", str(gap), "--out", str(tmp_path / "o")]) == 1
    said = capsys.readouterr()
    assert "resnet18: nothing chosen" in said.out
    assert "model=resnet18 method=sgdm base.weight_decay=0.001 seed=0" in said.err
    assert not (tmp_path / "o").exists()


def test_runs_on_held_out_data_choose_if_that_is_asked(tmp_path, capsys):
    grid(tmp_path, scores={1e-4: (99.0,), 5e-4: (1.0,), 1e-3: (2.0,)}, changes={"data.holdout": 9})
    assert main(["select", "table1", "--out", str(tmp_path)]) == 1
    assert "resnet18: nothing chosen" in capsys.readouterr().out
    assert main(["select", "table1", "--held-out", "--out", str(tmp_path)]) == 1
    assert "resnet18: 0.0001 (" in capsys.readouterr().out
    content = json.loads((tmp_path / "selection-table1-paper.json").read_text())
    assert content["evaluated_on"] == "held out training data"


@pytest.mark.parametrize(
    "recipe, said",
    [
        ("table4", "table4 has no SGDM.*table1, table2"),
        ("table10", "table10 has no grid of weight decays"),
        ("tabel1", "there is no 'tabel1'"),
    ],
)
def test_what_has_no_grid_is_refused(tmp_path, capsys, recipe, said):
    assert main(["select", recipe, "--out", str(tmp_path)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_selections_that_contradict_or_are_damaged_are_errors(tmp_path):
    row = {"dataset": "CIFAR-10", "model": "resnet18", "noise": 0.0, "chosen": 1e-3}
    for name, chosen in (("a", 1e-3), ("b", 1e-4)):
        content = {"scale": "paper", "rows": [{**row, "chosen": chosen}]}
        (tmp_path / f"selection-{name}.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="another file 0.001; delete one"):
        read_selections(tmp_path)
    (tmp_path / "selection-a.json").write_text("{")
    with pytest.raises(RunError, match="run `llqr select` again"):
        read_selections(tmp_path)
