"""Cells: grouping by seed, what is missing, doubled or changed, scales apart, and the files."""

import csv
import json
import math
import statistics

import pytest

from lab.collect.made_up import run, timing
from llqr_lab.cli import main
from llqr_lab.collect.cadence import fill_cadence
from llqr_lab.collect.runs import RunError, find_runs
from llqr_lab.collect.tables import fill_table
from llqr_lab.common.statistics import mean_std
from llqr_lab.paper import TABLES

ROW = ("table1", "CIFAR-10", "resnet18")
SGDM = {0: 95.0, 1: 95.5, 2: 96.1}
SAM = {0: 96.0, 1: 96.25, 3: 97.0}
BOTH = {0: 96.5, 1: 96.5}


def cells(table):
    return {
        (c["dataset"], c["model"], c["method"], c["noise"]): c
        for row in table.rows
        for c in row["cells"]
    }


def one(table, method, model="resnet18", dataset="CIFAR-10", noise=0.0):
    return cells(table)[dataset, model, method, noise]


@pytest.fixture
def root(tmp_path):
    for method, scores in (("SGDM", SGDM), ("SAM", SAM), ("LLQR+SAM (NGD)", BOTH)):
        for seed, best in scores.items():
            run(tmp_path, f"runs/{method}/{seed}", *ROW, method, seed, best)
    return tmp_path / "runs"


def test_a_cell_is_the_mean_and_std_over_its_seeds(root):
    table = fill_table("1", find_runs(root))
    sgdm = one(table, "SGDM")
    assert sgdm["seeds"] == [0, 1, 2]
    assert sgdm["mean"] == pytest.approx(sum(SGDM.values()) / 3)
    squares = sum((v - sgdm["mean"]) ** 2 for v in SGDM.values())
    assert sgdm["std"] == pytest.approx(math.sqrt(squares / 2))
    assert sgdm["last_mean"] == pytest.approx(sgdm["mean"] - 1)
    assert (sgdm["paper_mean"], sgdm["paper_std"]) == (96.14, 0.19)
    assert sgdm["ours"] == "95.53 ± 0.55"


def test_differences_are_paired_over_shared_seeds_alone(root):
    table = fill_table("1", find_runs(root))
    sam, both = one(table, "SAM"), one(table, "LLQR+SAM (NGD)")
    paired = [SAM[s] - SGDM[s] for s in (0, 1)]
    assert sam["baseline"] == "SGDM" and sam["pairs"] == 2
    assert sam["difference"] == pytest.approx(statistics.fmean(paired))
    # Two seeds have no standard error worth the name: both differences are shown.
    assert sam["standard_error"] is None
    assert sam["minus"] == f"+0.88 [{min(paired):+.2f}, {max(paired):+.2f}]"
    assert (both["baseline"], both["pairs"]) == ("SAM", 2)
    assert both["difference"] == pytest.approx(0.375)
    assert mean_std([]) == (None, None) and mean_std([3.0]) == (3.0, None)


def test_no_differences_without_shared_seeds_or_between_data(root):
    run(root, "9", *ROW, "FisherSAM", 9, 97.0)
    other = {"scale": "small", "changes": {"read": "other"}}
    run(root, "s", *ROW, "SAM", 0, 50.0, source="digits", **other)
    run(root, "t", *ROW, "LLQR+SAM (NGD)", 0, 60.0, source="other", **other)
    assert one(fill_table("1", find_runs(root)), "FisherSAM")["minus"] is None
    both = one(fill_table("1", find_runs(root), "small"), "LLQR+SAM (NGD)")
    assert both["mean"] == 60.0 and both["minus"] is None and both["pairs"] == 0


def test_what_is_missing_is_said_and_never_filled(root):
    table = fill_table("1", find_runs(root))
    assert table.missing_cells == 25
    gone = one(table, "LLQR (NGD)")
    assert gone["ours"] is None and gone["mean"] is None and gone["paper"] == "96.37 ± 0.11"
    assert gone["minus"] is None
    expected = "llqr run table1 model=resnet18 method=llqr seed=0 data=/path out="
    assert gone["command"] == expected + str(root)


def test_tables_share_the_runs_of_a_cell(root):
    found = find_runs(root)
    assert one(fill_table("4", found), "SAM")["mean"] == one(fill_table("1", found), "SAM")["mean"]


def test_a_seed_twice_is_an_error_unless_one_is_of_the_recipe(root):
    again = run(root, "again", "table4", *ROW[1:], "SAM", 0, 90.0)
    found = find_runs(root)
    assert one(fill_table("1", found), "SAM")["mean"] == pytest.approx(
        statistics.fmean(SAM.values())
    )
    assert any(
        "seed 0: of 2 equal runs that of table1 is used" in n for n in fill_table("1", found).notes
    )
    assert one(fill_table("4", found), "SAM")["mean"] == pytest.approx((90 + 96.25 + 97) / 3)
    run(root, "third", *ROW, "SAM", 0, 91.0)
    with pytest.raises(RunError, match="3 runs of seed 0: .*again.*delete all but one"):
        fill_table("1", find_runs(root))
    assert again.exists()


def test_runs_of_the_protocol_go_before_changed_ones_and_it_is_said(root):
    run(root, "changed", *ROW, "SAM", 5, 10.0, changes={"base.lr": 1.0})
    table = fill_table("1", find_runs(root))
    assert one(table, "SAM")["seeds"] == [0, 1, 3] and one(table, "SAM")["changed"] == []
    assert any("1 runs with settings changed by hand are not used" in n for n in table.notes)


def test_changed_runs_alone_are_used_and_marked(root):
    for seed in (0, 1):
        run(root, f"w{seed}", *ROW, "LLQR (NGD)", seed, 95.0, changes={"base.weight_decay": 1e-3})
    table = fill_table("1", find_runs(root))
    assert one(table, "LLQR (NGD)")["changed"] == ["base.weight_decay=0.001"]
    assert "* settings were changed by hand: base.weight_decay." in table.notes


def test_two_changes_of_a_cell_are_chosen_among_by_the_user(root, capsys):
    for decay in (1e-4, 1e-3):
        name = f"w{decay}"
        run(root, name, *ROW, "LLQR (NGD)", 0, 95.0, changes={"base.weight_decay": decay})
    with pytest.raises(RunError, match="base.weight_decay: 0.0001 or 0.001.*--where KEY=VALUE"):
        fill_table("1", find_runs(root))
    assert main(["table", "1", "--runs", str(root)]) == 2
    assert "base.weight_decay: 0.0001 or 0.001" in capsys.readouterr().err
    table = fill_table("1", find_runs(root, ["base.weight_decay=0.001"]))
    assert one(table, "LLQR (NGD)")["changed"] == ["base.weight_decay=0.001"]


def test_scales_never_mix_and_small_is_not_comparable(root):
    for method, best in (("SAM", 50.0), ("SGDM", 40.0)):
        run(root, f"s-{method}", *ROW, method, 0, best, scale="small", source="digits")
    found = find_runs(root)
    paper, small = fill_table("1", found), fill_table("1", found, "small")
    assert paper.scale == "paper" and one(paper, "SAM")["n"] == 3
    assert "2 runs of scale small are not used: scales never mix." in paper.notes
    assert one(small, "SAM")["mean"] == 50 and one(small, "SAM")["n"] == 1
    assert one(small, "SAM")["difference"] == 10.0
    assert small.notes[0].startswith("SCALE small: digits in place of CIFAR-10")
    assert "NOT COMPARABLE" in small.notes[0] and not small.content()["comparable"]
    assert not any("NOT COMPARABLE" in note for note in paper.notes)
    assert "scale=small" in one(small, "LLQR (NGD)")["command"]


def test_a_run_without_a_finite_result_is_left_out_and_said(root):
    run(root, "nan", *ROW, "SAM", 7, 0.0)
    path = root / "nan" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best": None}))
    table = fill_table("1", find_runs(root))
    assert one(table, "SAM")["seeds"] == [0, 1, 3]
    assert any("seed 7: no finite result" in note for note in table.notes)


def test_label_noise_makes_cells_of_their_own(tmp_path):
    for noise in (0.2, 0.8):
        where = ("table8", "CIFAR-100", "resnet18", "SAM")
        run(tmp_path, f"{noise}", *where, 0, 100 * noise, noise=noise)
    run(tmp_path, "clean", "table2", "CIFAR-100", "resnet18", "SAM", 0, 1.0)
    table = fill_table("8", find_runs(tmp_path))
    assert table.missing_cells == 18
    assert one(table, "SAM", dataset="CIFAR-100", noise=0.8)["mean"] == 80.0
    command = one(table, "Adam", dataset="CIFAR-100", noise=0.6)["command"]
    assert "method=adam noise=0.6 seed=0" in command


def test_bleu_has_its_own_metric(tmp_path):
    run(tmp_path, "x", "table6", "IWSLT14", "transformer-iwslt", "SAM", 0, 34.0)
    table = fill_table("6", find_runs(tmp_path))
    assert one(table, "SAM", "transformer-iwslt", "IWSLT14")["mean"] == 34.0
    run(
        tmp_path,
        "y",
        "table6",
        "IWSLT14",
        "transformer-iwslt",
        "AdamW",
        0,
        34.0,
        metric="test_accuracy",
    )
    with pytest.raises(RunError, match="metric: expected 'bleu', got 'test_accuracy'"):
        fill_table("6", find_runs(tmp_path))


@pytest.mark.parametrize("number", TABLES)
def test_the_command_writes_what_it_prints(number, tmp_path, capsys):
    if number == "10":
        timing(tmp_path, "runs/t", "vit-b16", "SGDM", None, 30.0)
    else:
        paper = TABLES[number]
        first = {**paper["run"], **paper["rows"][0]["run"], **paper["columns"][0]["run"]}
        noise = first.pop("noise", 0.0)
        run(tmp_path, "runs/x", f"table{number}", **first, seed=0, best=55.5, noise=noise)
    out = tmp_path / "out"
    assert main(["table", number, "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    content = json.loads((out / f"table{number}.json").read_text())
    rows = [row["cells"] for row in content["rows"]]
    assert len(rows) == len(TABLES[number]["rows"])
    assert {len(row) for row in rows} == {len(TABLES[number]["columns"])}
    with (out / f"table{number}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == sum(map(len, rows))
    page = (out / f"table{number}.md").read_text()
    value = "30.00 (1)" if number == "10" else "55.50 (1)"
    assert number == "10" or "| 54.50 |" in page  # after the last epoch
    assert value in said and value in page
    assert said.count("missing") == 1 + content["missing"]
    # Every number of the paper stands beside ours.
    for row in TABLES[number]["rows"]:
        for text in filter(None, row["cells"]):
            assert f"\\| {text}" in page


def test_without_runs_the_command_that_makes_one_is_said(tmp_path, capsys):
    assert main(["table", "4", "--out", str(tmp_path), "--scale", "small"]) == 1
    said = capsys.readouterr().err
    command = "llqr run table4 dataset=cifar-10 model=vgg16-bn method=llqr-f-sam scale=small seed=0"
    assert f"    {command} out={tmp_path}\n" in said
    assert not list(tmp_path.iterdir())
    assert main(["table", "11", "--out", str(tmp_path)]) == 2
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in capsys.readouterr().err


def test_a_damaged_run_stops_a_table(root, capsys):
    (root / "bad").mkdir()
    (root / "bad" / "result.json").write_text("{")
    assert main(["table", "1", "--runs", str(root)]) == 2
    assert str(root / "bad" / "result.json") in capsys.readouterr().err


def by_row(table):
    names = ("Updates", "Epoch time", "vs. SGD", "vs. SAM", "Steady update")
    return {tuple(row["labels"]): dict(zip(names, row["cells"], strict=True)) for row in table.rows}


def test_table_10_has_times_ratios_and_updates(tmp_path):
    for method, every, epoch, update in (
        ("SGDM", None, 30.0, None),
        ("SAM", None, 60.0, None),
        ("LLQR (NGD)", 50, 630.0, 37.5),
        ("LLQR+SAM (NGD)", 1500, 90.0, None),
    ):
        timing(tmp_path, f"{method}-{every}", "vit-b16", method, every, epoch, update)
    rows = by_row(fill_cadence(find_runs(tmp_path)))
    assert len(rows) == 30
    llqr = rows["ViT-B/16", "LLQR", "50"]
    assert [llqr[k]["ours"] for k in ("Updates", "Epoch time")] == ["32", "630.00"]
    assert [llqr[k]["ours"] for k in ("vs. SGD", "vs. SAM")] == ["21.00", "10.50"]
    assert llqr["Steady update"]["ours"] == "37.50"
    # (630 - 30) seconds over 782 / 50 refreshes
    assert llqr["Steady update"]["from_epochs"] == pytest.approx(600 * 50 / 782)
    assert not llqr["Epoch time"]["changed"]  # its interval is the row's
    long = rows["ViT-B/16", "LLQR+SAM", "1500"]
    assert long["Updates"]["ours"] == "2" and long["Steady update"]["ours"] is None
    assert rows["ViT-B/16", "SGD"]["Updates"]["ours"] == "–"
    assert rows["ViT-L/16", "SGD"]["Epoch time"]["ours"] is None


def test_table_10_warns_of_several_machines_and_shows_the_intervals_of_small_runs(tmp_path):
    timing(tmp_path, "a", "vit-b16", "SGDM", None, 2.0, scale="small", source="random")
    other = {"processor": "another"}
    at = ("vit-b16", "LLQR (NGD)", 5, 4.0, 1.0)
    timing(tmp_path, "b", *at, scale="small", source="random", environment=other)
    table = fill_cadence(find_runs(tmp_path))
    assert list(by_row(table)) == [("ViT-B/16", "SGD"), ("ViT-B/16", "LLQR", "5")]
    assert "NOT COMPARABLE" in table.notes[0]
    assert "NOT ONE MACHINE, so times do not compare: another; made up." in table.notes
    assert all(c["paper"] is None for row in table.rows for c in row["cells"])
