"""``llqr theory``: everything confirmed, written, and an exit status that means it."""

import csv
import json
from pathlib import Path

import pytest

from llqr_lab.cli import main
from llqr_lab.theory import checks
from llqr_lab.theory.findings import HOLDS, Finding


def finding(confirmed):
    curve = {"x": [1.0, 2.0, 4.0], "measured y": [1.0, 0.5, 0.25], "y": [1.0, 0.5, 0.25]}
    return Finding("(0)", "one is one", HOLDS, confirmed, {"one": 1.0}, "A note.", curve)


@pytest.mark.parametrize("confirmed", [True, False])
def test_the_exit_status_says_whether_all_was_confirmed(confirmed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checks, "CHECKS", {"only": lambda: [finding(confirmed)]})
    assert main(["theory", "--out", str(tmp_path)]) == (0 if confirmed else 1)
    verdict = "holds" if confirmed else "NOT CONFIRMED"
    assert f"{verdict:<18} (0): one is one" in capsys.readouterr().out
    assert json.loads((tmp_path / "theory.json").read_text())[0]["verdict"] == verdict
    with (tmp_path / "theory.csv").open() as file:
        assert next(csv.DictReader(file))["measured"] == "one: 1"
    assert (tmp_path / "theory.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_statement_is_checked_and_confirmed(tmp_path):
    assert main(["theory", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "theory.json").read_text())
    assert len(found) == 28
    sources = " ".join(f["source"] for f in found)
    for part in (
        "(3) (4) (5) (6) (10) (11) (12) (13) (14) (16) (17) (18) (19) (20) 4.2 B.1 B.2 B.3 B.4 9"
    ).split():
        assert part in sources
    page = (Path(__file__).parents[3] / "docs" / "theory.md").read_text()
    for f in found:
        statement = f["statement"].replace("|", r"\|")
        assert f"| {f['source']} | {statement} | {f['verdict']} |\n" in page
    slopes = {
        f["statement"]: f["measured"]["fitted slope"]
        for f in found
        if "fitted slope" in f["measured"]
    }
    assert len(slopes) == 2 and max(slopes.values()) <= -0.4
