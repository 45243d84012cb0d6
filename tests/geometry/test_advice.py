"""What a refresh tells: warnings with the way out, progress, and a report in words."""

from __future__ import annotations

import copy
import pickle

import pytest

import llqr
from llqr.geometry import _refresh_progress
from llqr.geometry._refresh_progress import RefreshProgress
from nets import bound
from tiny import mlp


def messages(found) -> list[str]:
    return [str(w.message) for w in found]


@pytest.mark.parametrize(
    "settings, advice",
    [
        ({"lr": 1e-6}, "a larger inner lr (or lr='auto'), a smaller ema or more frequent"),
        ({"ema": 0.9999}, "is the base optimizer's; a smaller ema or more frequent"),
    ],
)
def test_u_that_hardly_acts(settings, advice):
    problem = mlp()
    geometry = bound(problem, "kfac", **settings)
    for step in range(2):
        geometry.refresh([problem], step=step)
    with pytest.warns(UserWarning, match="U hardly acts: after three refreshes") as found:
        for step in range(2, 9):
            geometry.refresh([problem], step=step)
    assert len(found) == 1 and advice in messages(found)[0]


def test_u_that_acts_and_the_identity_are_not_warned_of(recwarn):
    problem = mlp()
    for structure, settings in (("kfac", {"ema": 0.5}), ("identity", {})):
        geometry = bound(problem, structure, **settings)
        for step in range(4):
            geometry.refresh([problem], step=step)
    assert not recwarn.list


def test_a_step_that_goes_up_in_the_model():
    problem = mlp()
    geometry = bound(problem, "diagonal", scale=400, lr=1e-4)
    with pytest.warns(UserWarning, match="is positive: a step -Ug would raise the loss") as found:
        for step in range(2):
            report = geometry.refresh([problem], step=step)
    assert report.J_after > 0 and len(found) == 1 and "lr='auto'" in messages(found)[0]
    assert "would raise the loss" in str(report)


def test_how_many_refreshes_a_run_has():
    problem = mlp()
    for every, start, steps, count in [
        (500, 0, 500, 1),
        (500, 0, 501, 2),
        (llqr.growing(5, 500), 0, 100, 12),
        (3, 2, 7, 2),
        (3, 9, 7, 0),
    ]:
        geometry = bound(problem, "scalar", every=every, start=start)
        assert geometry.refreshes_in(steps) == count


def test_progress_after_two_seconds_and_a_few_times_a_second(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_refresh_progress.time, "perf_counter", lambda: clock[0])
    told = []
    progress = RefreshProgress(lambda *values: told.append(values), 52)
    for _ in range(40):
        clock[0] += 0.1
        progress.advance()
    assert told[0] == (20, 52, pytest.approx(2.0))
    assert len(told) == 7 and told[-1][0] <= 40
    silent = RefreshProgress(None, 52)
    silent.advance()


def test_a_refresh_calls_its_callback_and_copies_lack_it(monkeypatch):
    monkeypatch.setattr(_refresh_progress, "PATIENCE", 0.0)
    monkeypatch.setattr(_refresh_progress, "PAUSE", 0.0)
    problem, told = mlp(), []
    geometry = bound(problem, "kfac", steps=9)
    geometry.on_progress = lambda done, total, seconds: told.append((done, total))
    report = geometry.refresh([problem])
    assert told == [(i + 1, 11) for i in range(report.products)]
    assert copy.deepcopy(geometry).on_progress is None
    assert pickle.loads(pickle.dumps(geometry)).on_progress is None


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"change": 0.25, "J_after": -1.0}, ["changes the gradient by 25 %", "lowers the loss"]),
        ({"change": 0.01}, ["It hardly acts", "smaller ema"]),
        ({"J_after": 0.5}, ["would raise the loss", "small base lr"]),
        ({"accepted": False, "reason": "J did not go down", "change": 0.1},
         ["refused (J did not go down)", "U stays as it was", "smaller inner lr"]),
        ({"accepted": False, "reason": "saturated"}, ["training goes on"]),
    ],
)  # fmt: skip
def test_a_report_in_words(fields, said):
    report = llqr.RefreshReport(**{"step": 7, "accepted": True, **fields})
    headline, words = str(report).split("\n")
    assert headline == report.headline() and headline.startswith("refresh at step 7 ")
    assert all(text in headline + words for text in said)
    assert "\n" not in repr(report)
