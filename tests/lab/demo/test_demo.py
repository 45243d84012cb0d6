"""``llqr demo``, from the command line to its files."""

import json
import statistics
from pathlib import Path

import pytest
import torch

import llqr
from llqr_lab.cli import main
from llqr_lab.commands.demo import read_settings
from llqr_lab.demo.page import settings_text, write_page
from llqr_lab.demo.runs import SETTINGS_FILE, History
from llqr_lab.demo.search import RUNGS
from llqr_lab.protocols import DEMO_METHODS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run the quick demo once, in this process; return its folder and what it printed."""
    import contextlib
    import io

    out, text = tmp_path_factory.mktemp("demo") / "made" / "here", io.StringIO()
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(text):
        assert main(["demo", "--quick", "--workers", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    return out, text.getvalue()


def test_it_says_where_its_files_are(demo):
    out, text = demo
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.png",
        "curves.svg",
        "results.json",
    ]
    assert f"written to {out}" in text
    assert "these numbers mean little" in text
    assert "How to choose" in text


def test_results(demo):
    out, text = demo
    results = json.loads((out / "results.json").read_text())
    assert results["quick"] and results["seeds"] == [0, 1] and results["epochs"] == 3
    assert results["noise"] == 0.4
    assert list(results["methods"]) == list(DEMO_METHODS)
    recorded = read_settings(SETTINGS_FILE)
    assert results["search"] == recorded["search"]
    sam = results["methods"]["SAM"]["test_accuracy"]
    for name, method in results["methods"].items():
        assert method["settings"] == recorded["methods"][name]["settings"]
        final = method["test_accuracy"]
        assert final == [epochs[-1] for epochs in method["test_accuracy_by_epoch"]]
        assert all(len(epochs) == 3 for epochs in method["test_accuracy_by_epoch"])
        assert method["mean"] == pytest.approx(sum(final) / 2)
        assert method["std"] == pytest.approx(statistics.stdev(final))
        assert method["minus_SAM"]["mean"] == pytest.approx(
            statistics.fmean(a - b for a, b in zip(final, sam, strict=True))
        )
        assert f"{method['mean']:.2f} +- {method['std']:.2f}" in text
        assert f"{statistics.fmean(c[-1] for c in method['loss_by_epoch']):.3f}" in text
        assert all(0 < a < b < c for a, b, c in method["seconds_by_epoch"])
        assert method["steps_by_epoch"] == [11, 22, 33]
        assert (method["refreshes"] is not None) == ("LLQR" in name or "NG" in name)
        assert method["skipped_steps"] == [0, 0]
        if method["refreshes"] is None:
            continue
        reports = [report for seed in method["reports"] for report in seed]
        assert method["refreshes"]["count"] == len(reports) >= 2
        change = statistics.median(report["change"] for report in reports)
        assert method["refreshes"]["change"] == pytest.approx(change)
        assert f"|Ug-g|/|g| {change:.3g}" in text
    whole = results["methods"]["SGDM"]["to_SGDMs_loss"]
    assert whole["steps"] == 33 and whole["seconds"] > 0


def test_something_is_learned(demo):
    """Three epochs are few; a broken loop would stay at the 10 % of guessing."""
    results = json.loads((demo[0] / "results.json").read_text())
    assert max(method["mean"] for method in results["methods"].values()) > 60


def test_the_picture_is_one(demo):
    from matplotlib.image import imread

    picture = imread(demo[0] / "curves.png")
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.02  # not blank
    assert "<svg" in (demo[0] / "curves.svg").read_text()


def test_u_inactive_is_said(tmp_path, capsys):
    """A tiny inner learning rate leaves U at the identity, and the demo says so."""
    recorded = json.loads(SETTINGS_FILE.read_text())
    for name, inner_lr in (("LLQR", 1e-6), ("LLQR+SAM", 0.3)):
        recorded["methods"][name]["settings"] |= {"structure": "kfac", "inner_lr": inner_lr}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(recorded))
    arguments = ["--quick", "--seeds", "1", "--workers", "1", "--settings", str(path)]
    assert main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split(" (")[0]: "U inactive" in lines[i + 1]
        for i, line in enumerate(lines)
        if line.startswith("LLQR") and "refreshes accepted" in line
    }
    assert verdicts == {"LLQR": True, "LLQR+SAM": False}
    assert "U is inactive in LLQR: what is seen there is the base and the probe." in lines


def test_no_bar_without_a_terminal(demo, capfd):
    out, text = demo
    assert "\r" not in text


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("minus SAM", "standard", "--quick", "--seeds", "--out", "U is inactive"):
        assert word in text


@pytest.mark.parametrize("value", ["0", "-1", "x", "1001"])
def test_bad_numbers_of_seeds(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--seeds", value])
    assert stop.value.code == 2
    assert "--seeds" in capsys.readouterr().err


def test_a_settings_file_without_a_method(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"methods": {name: {} for name in DEMO_METHODS if name != "SAM"}}))
    with pytest.raises(ValueError, match="has no settings of SAM"):
        main(["demo", "--settings", str(path)])


def test_the_page_names_the_recorded_settings():
    page = (Path(__file__).parents[3] / "docs" / "demo.md").read_text()
    recorded = json.loads(SETTINGS_FILE.read_text())["methods"]
    assert f"gave every method {sum(c * s for c, s in RUNGS)} runs" in page
    assert settings_text({name: entry["settings"] for name, entry in recorded.items()}) in page


def test_the_page_is_made_of_the_runs(tmp_path):
    """A page of its own: results, refreshes and settings stand between its marks."""
    numbers = {"step": 0, "accepted": True, "reason": None, "J_before": -1.0, "J_after": -2.0}
    numbers |= {"gradient_norm": 1.0, "ratio": 1.1, "change": 0.5, "cosine": 0.9, "products": 5}
    numbers |= {"eigenvalue_min": 0.25, "eigenvalue_max": 4.0, "seconds": 0.1}
    report = llqr.RefreshReport(**numbers)
    histories = {
        name: [
            History([2.0, 1.0], [0.5, 1.0], [11, 22], [50.0, 90.0 + seed], reports=reports)
            for seed in range(4)
        ]
        for name, reports in (("SGDM", []), ("SAM", []), ("NG", [report]))
    }
    marks = ("few", "all", "conclusion", "refreshes", "settings", "environment")
    page = tmp_path / "demo.md"
    page.write_text("".join(f"<!-- demo {m} -->\nstale\n<!-- end -->\n" for m in marks))
    (tmp_path / "images").mkdir()
    for _ in range(2):  # again: nothing is left of the first
        write_page(tmp_path, {name: {"lr": 0.1} for name in histories}, histories)
    text = page.read_text()
    assert "stale" not in text and text.count("<!-- end -->") == len(marks)
    assert "| SGDM | 1.000 | 91.00 ± 1.00 | +0.00 ± 0.00 | 1.00 | 22 |" in text
    assert "| SGDM | 1.000 | 91.50 ± 1.29 | +0.00 ± 0.00 | 1.00 | 22 |" in text
    assert "| NG | 4 of 4 | 0.5 | 1.1 | 0.9 | 0.25 .. 4 |" in text
    assert "| NG | lr 0.1 |" in text
    assert {p.name for p in (tmp_path / "images").iterdir()} == {
        "demo-curves.png",
        "demo-curves.svg",
    }
