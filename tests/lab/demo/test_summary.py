"""The demo's statistics against naive computations, and what it says of U."""

import math

import pytest

import llqr
from llqr_lab.demo.runs import History
from llqr_lab.demo.summary import accuracy_rows, refresh_lines, summarise_runs


def report(change=0.5, accepted=True, **values):
    numbers = {
        "step": 0,
        "accepted": accepted,
        "reason": None if accepted else "J did not go down",
        "J_before": -1.0,
        "J_after": -2.0 if accepted else math.nan,
        "gradient_norm": 1.0,
        "ratio": 1.1,
        "change": change,
        "cosine": 0.9,
        "eigenvalue_min": 0.25,
        "eigenvalue_max": 4.0,
        "products": 5,
        "seconds": 0.1,
    }
    return llqr.RefreshReport(**{**numbers, **values})


def history(accuracy, *reports):
    return History(
        loss=[2.0, 1.0],
        test_accuracy=[50.0, accuracy],
        train_accuracy=60.0,
        reports=list(reports),
        spectra=[{"a": (0.25, 4.0)} for _ in reports],
        seconds=1.0,
    )


def settings(*names):
    learned = {"structure": "kfac", "inner_lr": 0.1}
    return {name: learned if "LLQR" in name else {"lr": 0.1} for name in names}


def test_one_seed_has_no_error_bar():
    runs = {"SAM": [history(90.0)], "SGDM": [history(88.0)]}
    rows = accuracy_rows(summarise_runs(settings(*runs), runs))
    assert rows[1]["test accuracy %"] == "88.00" and rows[1]["minus SAM"] == "-2.00"


def test_rows_pair_the_seeds():
    runs = {
        "SAM": [history(90.0), history(80.0)],
        "LLQR+SAM": [history(91.0, report()), history(83.0, report())],
    }
    methods = summarise_runs(settings(*runs), runs)
    rows = accuracy_rows(methods)
    assert [row["method"] for row in rows] == list(runs)
    assert rows[0]["minus SAM"] == "-"
    assert rows[1]["minus SAM"] == "+2.00 [+1.00, +3.00]"  # of two seeds
    assert rows[1]["test accuracy %"] == f"87.00 +- {math.sqrt(32):.2f}"
    assert methods["SAM"]["refreshes"] is None


@pytest.mark.parametrize(("median", "active"), [(0.09, False), (0.11, True)])
def test_the_line_says_when_u_is_inactive(median, active):
    """One large outlier does not make U active: the median decides."""
    reports = [report(median), report(median / 2), report(3.0)]
    runs = {"SAM": [history(90.0)], "LLQR": [history(90.0, *reports)]}
    methods = summarise_runs(settings(*runs), runs)
    lines = "\n".join(refresh_lines(methods))
    assert methods["LLQR"]["refreshes"]["change"] == median
    assert f"|Ug-g|/|g| {median:g}" in lines
    assert ("U inactive" in lines) is not active
    assert "SAM" not in lines


def test_refused_refreshes_are_counted_and_leave_no_nan():
    runs = {
        "SAM": [history(90.0)],
        "LLQR": [history(90.0, report(), report(accepted=False, change=math.nan))],
    }
    methods = summarise_runs(settings(*runs), runs)
    r = methods["LLQR"]["refreshes"]
    assert (r["count"], r["accepted"]) == (2, 1)
    assert (r["J_before"], r["J_after"], r["change"]) == (-1.0, -2.0, 0.5)
    assert methods["LLQR"]["reports"][0][1]["J_after"] is None
    assert "1 of 2 refreshes accepted, J -1 -> -2" in "\n".join(refresh_lines(methods))


def test_no_accepted_refresh_at_all():
    refused = report(accepted=False, change=math.nan, ratio=math.nan, cosine=math.nan)
    runs = {"SAM": [history(90.0)], "LLQR": [history(90.0, refused)]}
    lines = "\n".join(refresh_lines(summarise_runs(settings(*runs), runs)))
    assert "0 of 1 refreshes accepted, J - -> -" in lines and "U inactive" in lines
