"""The demo's statistics against naive computations, and what it says of U."""

import math

import pytest

import llqr
from llqr_lab.demo.runs import History
from llqr_lab.demo.summary import conclusion_lines, refresh_lines, result_rows, summarise_runs


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


def history(accuracy, *reports, loss=(2.0, 1.0), seconds=1.0):
    return History(
        loss=list(loss),
        seconds=[seconds / 2, seconds],
        steps=[10, 20],
        test_accuracy=[50.0, accuracy],
        train_accuracy=60.0,
        reports=list(reports),
    )


def settings(*names):
    learned = {"structure": "kfac", "inner_lr": 0.1}
    return {name: learned if "LLQR" in name else {"lr": 0.1} for name in names}


def summary(**runs):
    """Summarise runs, with SAM and SGDM if they are not there; "_" stands for "+"."""
    seeds = len(next(iter(runs.values())))
    default = {name: [history(90.0)] * seeds for name in ("SGDM", "SAM")}
    named = default | {name.replace("_", "+"): hs for name, hs in runs.items()}
    return summarise_runs(settings(*named), named)


def row_of(methods, name):
    return next(row for row in result_rows(methods) if row["method"] == name)


def test_one_seed_has_no_error_bar():
    row = row_of(summary(SGDM=[history(88.0)]), "SGDM")
    assert row["test %"] == "88.00" and row["minus SAM"] == "-2.00"


def test_rows_pair_the_seeds():
    methods = summary(
        SAM=[history(90.0), history(80.0)],
        LLQR_SAM=[history(91.0, report()), history(83.0, report())],
    )
    assert row_of(methods, "SAM")["minus SAM"] == "-"
    row = row_of(methods, "LLQR+SAM")
    assert row["minus SAM"] == "+2.00 [+1.00, +3.00]"  # of two seeds
    assert row["test %"] == f"87.00 +- {math.sqrt(32):.2f}"
    assert methods["SAM"]["refreshes"] is None


def test_the_way_to_the_loss_of_sgdm():
    """In straight lines between the ends of epochs; the median of the seeds."""
    methods = summary(
        SGDM=[history(90.0)] * 3,
        NG=[
            history(90.0, loss=(2.0, 0.0), seconds=3.0),  # at 1.0 in the middle of the second epoch
            history(90.0, loss=(1.5, 0.5), seconds=3.0),
            history(90.0, loss=(2.0, 1.1), seconds=3.0),
        ],
        SAM=[history(90.0, loss=(2.0, 1.5))] * 3,
    )
    assert methods["NG"]["to_SGDMs_loss"] == {"steps": 15.0, "seconds": 2.25}
    assert methods["SAM"]["to_SGDMs_loss"] is None
    shown = {row["method"]: row["steps to SGDM's loss"] for row in result_rows(methods)}
    assert shown == {"SGDM": "20", "NG": "15", "SAM": "not reached"}
    assert row_of(methods, "NG")["training loss"] == "0.533"
    speed, *_ = conclusion_lines(methods)
    assert speed.startswith("NG is the first") and "75% of its steps and 225% of its" in speed


def test_a_method_on_adamw_is_compared_with_adamw():
    """It is at AdamW's 1.5 in the middle of its second epoch: 15 of 20 steps, 3 of 2 seconds."""
    adamw = [history(a, loss=(2.0, 1.5), seconds=2.0) for a in (90.0, 80.0, 85.0)]
    gm = [history(a, loss=(2.0, 1.0), seconds=4.0) for a in (91.0, 82.1, 85.9)]
    slow = [history(a, loss=(3.0, 2.0)) for a in (90.0, 80.1, 84.9)]
    lines = conclusion_lines(summary(AdamW=adamw, GM=gm, **{"GM_SAM/5": slow}))
    assert lines[2:] == [
        "GM, whose base is AdamW, is at the training loss at which AdamW ends in 75% of its steps "
        "and 150% of its seconds; on the test it is better (+1.33 +- 0.38).",
        "GM+SAM/5, whose base is AdamW, does not reach the training loss at which AdamW ends; on "
        "the test no difference can be told (+0.00 +- 0.06).",
    ]
    assert conclusion_lines(summary(GM=gm))[2:] == []


def test_the_conclusion_says_only_what_the_numbers_say():
    def seeds(*accuracies):
        return [history(a, report(), loss=(3.0, 2.0)) for a in accuracies]

    methods = summary(
        SAM=seeds(90.0, 80.0, 85.0),
        SGDM=[history(a) for a in (88.0, 78.1, 82.9)],
        AdamW=seeds(91.0, 82.1, 85.9),
        NG=seeds(91.0, 79.0, 85.5),
    )
    assert conclusion_lines(methods) == [
        "No method is earlier than SGDM at the training loss at which SGDM ends.",
        "On the test, by two standard errors, AdamW is better than SAM; SGDM is worse than SAM; "
        "between NG and SAM no difference can be told.",
    ]
    few = conclusion_lines(summary(SAM=seeds(90.0, 80.0), NG=seeds(99.0, 99.0)))
    assert few[1] == "On the test no difference to SAM can be told from so few seeds."
    idle = conclusion_lines(
        summary(NG=[history(90.0, report(0.01))], LLQR=[history(90.0, report(0.02))])
    )
    assert idle[2] == "U is inactive in NG and LLQR: what is seen there is the base and the probe."


@pytest.mark.parametrize(("median", "active"), [(0.09, False), (0.11, True)])
def test_the_line_says_when_u_is_inactive(median, active):
    """One large outlier does not make U active: the median decides."""
    reports = [report(median), report(median / 2), report(3.0)]
    methods = summary(LLQR=[history(90.0, *reports)])
    lines = "\n".join(refresh_lines(methods))
    assert methods["LLQR"]["refreshes"]["change"] == median
    assert f"|Ug-g|/|g| {median:g}" in lines
    assert ("U inactive" in lines) is not active
    assert "SAM" not in lines


def test_refused_refreshes_are_counted_and_leave_no_nan():
    methods = summary(LLQR=[history(90.0, report(), report(accepted=False, change=math.nan))])
    r = methods["LLQR"]["refreshes"]
    assert (r["count"], r["accepted"]) == (2, 1)
    assert (r["J_before"], r["J_after"], r["change"]) == (-1.0, -2.0, 0.5)
    assert methods["LLQR"]["reports"][0][1]["J_after"] is None
    assert "1 of 2 refreshes accepted, J -1 -> -2" in "\n".join(refresh_lines(methods))


def test_no_accepted_refresh_at_all():
    refused = report(accepted=False, change=math.nan, ratio=math.nan, cosine=math.nan)
    lines = "\n".join(refresh_lines(summary(LLQR=[history(90.0, refused)])))
    assert "0 of 1 refreshes accepted\n" in lines and "U inactive" in lines
