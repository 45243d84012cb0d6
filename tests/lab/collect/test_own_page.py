"""The results page: its tables are what the committed runs say."""

import re
import statistics
from pathlib import Path

import pytest

from llqr_lab.collect.own_page import changes_table, fill_page, main
from llqr_lab.collect.runs import find_runs
from llqr_lab.protocols import EXPERIMENTS, resolve_settings
from llqr_lab.protocols.experiments import OWN

ROOT = Path(__file__).parents[3]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "results"


@pytest.fixture(scope="module")
def found():
    return find_runs(RESULTS)


def test_the_pages_tables_are_those_of_the_committed_runs(found):
    page = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"<!-- table (\S+)", page)
    shown = {run["recipe"] for run in found.runs}
    assert list(dict.fromkeys(names)) == [*(o for o in OWN if o in shown), "table7", "changes"]
    assert shown <= set(names)  # no run that no page shows
    assert fill_page(page, found) == page
    assert "| missing" not in page


def test_committed_runs_have_the_settings_of_the_protocols(found):
    for run in found.runs:
        assert run["changed"] == [] and run["skipped_steps"] == 0
        protocol = resolve_settings(
            run["recipe"], run["dataset"], run["model"], run["method"], run["scale"]
        )
        for key in ("base.lr", "probe.rho", "llqr.structure", "llqr.every", "train.epochs"):
            if key in protocol:
                assert run["settings"][key] == protocol[key].value, (run.folder, key)


def test_every_method_has_the_same_seeds(found):
    seeds = {}
    for run in found.runs:
        seeds.setdefault(run["recipe"], {}).setdefault(run["method"], set()).add(run["seed"])
    for recipe, methods in seeds.items():
        assert set(methods) <= set(EXPERIMENTS[recipe].methods)
        assert len({tuple(sorted(s)) for s in methods.values()}) == 1
        assert all(len(s) >= 3 for s in methods.values())


def test_what_changed_stands_beside_what_an_earlier_version_came_to(found):
    (recipe,) = {run["recipe"] for run in found.runs} & {"fashion"}
    u = {"values": {"0": 80.0, "1": 82.0}, "change": 0.5, "refused": 3, "refreshes": 4}
    earlier = {recipe: {"measure": "test_accuracy", "methods": {"LLQR (NGD)": u, "F-SAM": u}}}
    rows = [line.split(" | ") for line in changes_table(earlier, found).splitlines()]
    by_method = {row[1]: row for row in rows[2:]}
    of_u = [r for r in found.runs if r["recipe"] == recipe and r["method"] == "LLQR (NGD)"]
    now = [r["epochs"][-1]["test_accuracy"] for r in of_u]
    assert by_method["LLQR (NGD)"][2:5] == [
        "81.00 ± 1.41 (2)",
        f"{statistics.fmean(now):.2f} ± {statistics.stdev(now):.2f} ({len(now)})",
        "0.5 (3 of 4 refused)",
    ]
    assert by_method["SGDM"][2] == "" and "NG" in by_method


def test_a_stale_table_is_made_anew(found, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table table7 -->\nold\n<!-- end -->\nafter\n")
    assert main([str(RESULTS), str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and "LLQR^Delta+SAM" in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
