"""The results page: its tables are what the committed runs say."""

import re
from pathlib import Path

import pytest

from llqr_lab.collect.own_page import fill_page, main
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
    assert list(dict.fromkeys(names)) == [*OWN, "table7"]
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


@pytest.mark.parametrize("recipe", OWN)
def test_every_method_has_the_same_seeds(found, recipe):
    seeds = {}
    for run in found.runs:
        if run["recipe"] == recipe:
            seeds.setdefault(run["method"], set()).add(run["seed"])
    assert set(seeds) == set(EXPERIMENTS[recipe].methods)
    assert len({tuple(sorted(s)) for s in seeds.values()}) == 1 and len(seeds["SAM"]) >= 3


def test_a_stale_table_is_made_anew(found, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table table7 -->\nold\n<!-- end -->\nafter\n")
    assert main([str(RESULTS), str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and "LLQR^Delta+SAM" in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
