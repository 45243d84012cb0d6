"""state_dict(): the standard form, one object for everything, a resume that cannot be told."""

import copy
import warnings

import pytest
import torch

from tables import BASES, GEOMETRIES, LEFT_OUT, MATRICES_ONLY, METRIC_AND_PROBE, PERTURBATIONS
from tiny import (
    WAYS,
    everything,
    mlp,
    norm_net,
    optimizer_of,
    poisoned,
    same,
    through_file,
    train,
)


def start(base=None, geometry="kfac", perturbation="FriendlySAM", make=norm_net, **options):
    problem = make()
    parameters = list(problem.model.parameters())
    if base in MATRICES_ONLY:
        parameters = [p for p in parameters if p.dim() == 2]
    optimizer = optimizer_of(
        problem,
        None if base is None else BASES[base](parameters),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
        **options,
    )
    return problem, optimizer


def resumed(saved, **options):
    problem, optimizer = start(**options)
    problem.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return problem, optimizer


def saved(problem, optimizer):
    return through_file({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()})


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, 3, 4])
@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_resume_is_bitwise(geometry, perturbation, when):
    """In the middle of momentum, between refreshes (every 2 steps), through a file."""
    options = {"geometry": geometry, "perturbation": perturbation}
    problem, optimizer = start(**options)
    train(optimizer, problem, when)
    checkpoint = saved(problem, optimizer)
    losses = train(optimizer, problem, 4)
    again, fresh = resumed(checkpoint, **options)
    same(saved(again, fresh), checkpoint)
    same(train(fresh, again, 4), losses)
    same(everything(fresh), everything(optimizer))


@pytest.mark.parametrize("base", BASES)
def test_resume_is_bitwise_for_every_base(base):
    if base in LEFT_OUT:
        pytest.skip(LEFT_OUT[base])
    # In float64 torch casts the float32 scalars of NAdam and ASGD at load, and so rounds anew.
    options = {"base": base, "make": lambda: norm_net(torch.float32)}
    problem, optimizer = start(**options)
    train(optimizer, problem, 3)
    checkpoint = saved(problem, optimizer)
    train(optimizer, problem, 3)
    again, fresh = resumed(checkpoint, **options)
    train(fresh, again, 3)
    same(everything(fresh), everything(optimizer))


@pytest.mark.parametrize("way", WAYS)
def test_resume_in_every_way(way):
    problem, optimizer = start()
    train(optimizer, problem, 3, way)
    checkpoint = saved(problem, optimizer)
    train(optimizer, problem, 3, way)
    again, fresh = resumed(checkpoint)
    train(fresh, again, 3, way)
    same(everything(fresh), everything(optimizer))


def test_loading_replaces_what_an_optimizer_had_learned():
    problem, optimizer = start()
    train(optimizer, problem, 3)
    checkpoint = saved(problem, optimizer)
    train(optimizer, problem, 5)
    problem.model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    same(saved(problem, optimizer), checkpoint)
    again, fresh = resumed(copy.deepcopy(checkpoint))
    train(optimizer, problem, 3)
    train(fresh, again, 3)
    same(everything(fresh), everything(optimizer))


def test_counters_and_report_are_saved():
    problem, optimizer = start(geometry="diagonal", perturbation="none", make=mlp)
    train(optimizer, problem, 3)
    poisoned(problem, {0})
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1)
    optimizer._progress.skipped_probes = 7
    _, fresh = resumed(
        saved(problem, optimizer), geometry="diagonal", perturbation="none", make=mlp
    )
    assert (fresh.skipped_steps, fresh.skipped_probes) == (1, 7)
    assert fresh.last_report == optimizer.last_report
    assert fresh.geometry.counters() == optimizer.geometry.counters()
    assert fresh.geometry.counters()["refreshes"] == 2


def test_a_refused_report_is_saved():
    problem, optimizer = start(geometry="diagonal", perturbation="none", make=mlp)
    bad = problem.part(0, 6)
    bad.x = bad.x * float("nan")
    with pytest.warns(UserWarning, match="refused"):
        optimizer.refresh(bad)
    _, fresh = resumed(
        saved(problem, optimizer), geometry="diagonal", perturbation="none", make=mlp
    )
    assert not fresh.last_report.accepted
    assert fresh.last_report.reason == optimizer.last_report.reason
    assert fresh.geometry.counters()["failures"] == 1


def test_the_count_of_failures_in_a_row_is_resumed():
    def fail(optimizer, problem):
        bad = problem.part(0, 6)
        bad.x = bad.x * float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.refresh(bad)

    problem, optimizer = start(geometry="diagonal", make=mlp)
    for _ in range(3):
        fail(optimizer, problem)
    again, fresh = resumed(saved(problem, optimizer), geometry="diagonal", make=mlp)
    fail(fresh, again)
    assert fresh.geometry.counters()["failures"] == 4


# -- the form --------------------------------------------------------------------------------------


def test_the_standard_form():
    problem, optimizer = start("AdamW")
    train(optimizer, problem, 2)
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    count = len(list(problem.model.parameters()))
    assert state["param_groups"][0]["params"] == list(range(count))
    assert set(state["state"]) <= set(range(count))
    plain = optimizer.base.state_dict()
    for i, entry in plain["state"].items():
        for key, value in entry.items():
            same(state["state"][i][key], value)
    for key, value in plain["param_groups"][0].items():
        same(state["param_groups"][0][key], value)
    ours = {k for e in state["state"].values() for k in e} - {"step", "exp_avg", "exp_avg_sq"}
    assert ours and all(k.startswith("llqr.") for k in ours)


def test_the_live_state_is_untouched():
    problem, optimizer = start("AdamW")
    optimizer.state_dict()
    assert len(optimizer.state) == 0  # Adam initializes where this is empty
    train(optimizer, problem, 2)
    optimizer.state_dict()["param_groups"][0]["lr"] = 77.0
    optimizer.state_dict()["state"][0].clear()
    keys = {k for entry in optimizer.base.state.values() for k in entry}
    assert keys == {"step", "exp_avg", "exp_avg_sq"}
    assert not any("llqr" in k for group in optimizer.param_groups for k in group)
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_fresh_state_dict_has_all_keys(geometry):
    """torch.distributed.checkpoint fills a fresh one in place."""
    problem, optimizer = start(geometry=geometry)
    fresh = optimizer.state_dict()
    train(optimizer, problem, 3)
    later = optimizer.state_dict()
    assert list(fresh["param_groups"][0]) == list(later["param_groups"][0])
    for i, entry in later["state"].items():
        ours = {k for k in entry if k.startswith("llqr.")}
        assert ours == {k for k in fresh["state"].get(i, {}) if k.startswith("llqr.")}


def test_two_calls_give_the_same():
    problem, optimizer = start("Adam")
    train(optimizer, problem, 3)
    same(optimizer.state_dict(), optimizer.state_dict())


def test_loading_leaves_the_given_dict_alone():
    problem, optimizer = start()
    train(optimizer, problem, 3)
    state = optimizer.state_dict()
    copied = copy.deepcopy(state)
    _, fresh = start()
    fresh.load_state_dict(state)
    same(state, copied)


def test_U_and_memory_are_not_cast_to_bfloat16():
    """torch's load_state_dict casts state to the parameter's dtype; U stays float32."""

    def make():
        return mlp(torch.bfloat16)

    problem, optimizer = start("AdamW", make=make)
    train(optimizer, problem, 3)
    checkpoint = saved(problem, optimizer)
    ours = {
        k: v.dtype
        for e in checkpoint["optimizer"]["state"].values()
        for k, v in e.items()
        if k.startswith("llqr.")
    }
    assert len(ours) > 2 and set(ours.values()) == {torch.float32}
    again, fresh = resumed(checkpoint, base="AdamW", make=make)
    same(saved(again, fresh), checkpoint)
    train(optimizer, problem, 3)
    train(fresh, again, 3)
    same(everything(fresh), everything(optimizer))


def test_mixed_dtypes_resume():
    def make():
        problem = mlp()
        problem.model[2].float()
        problem.model.insert(2, ToFloat())
        return problem

    problem, optimizer = start("AdamW", make=make)
    train(optimizer, problem, 3)
    checkpoint = saved(problem, optimizer)
    again, fresh = resumed(checkpoint, base="AdamW", make=make)
    train(optimizer, problem, 3)
    train(fresh, again, 3)
    same(everything(fresh), everything(optimizer))


class ToFloat(torch.nn.Module):
    def forward(self, x):
        return x.float()
