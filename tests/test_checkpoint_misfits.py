"""A state dict that does not fit is refused with a clear error, and nothing changes."""

import copy
import warnings

import pytest
import torch

import llqr
from tables import GEOMETRIES, PERTURBATIONS
from tiny import (
    STRUCTURES,
    everything,
    llqr_of,
    mlp,
    optimizer_of,
    same,
    sgd,
    through_file,
    train,
    train_plainly,
)


def start(geometry="kfac", perturbation="FriendlySAM"):
    problem = mlp()
    return problem, optimizer_of(
        problem, geometry=GEOMETRIES[geometry](), perturbation=PERTURBATIONS[perturbation]()
    )


def test_the_state_of_a_plain_optimizer_is_taken_over_with_a_warning():
    plain = mlp()
    base = sgd(plain, momentum=0.9, lr=0.3)
    train_plainly(base, plain, 3)
    problem, optimizer = start()
    with pytest.warns(UserWarning, match="plain optimizer"):
        optimizer.load_state_dict(through_file(base.state_dict()))
    same(optimizer.base.state_dict(), base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    train(optimizer, problem, 2)


@pytest.mark.parametrize("mine", [*STRUCTURES, "e-kfac-gradient"])
@pytest.mark.parametrize("theirs", [*STRUCTURES, "e-kfac-gradient"])
def test_another_structure_is_refused_and_nothing_changes(theirs, mine):
    if mine == theirs:
        pytest.skip("the same structure loads: test_resume_is_bitwise")
    problem, optimizer = start(geometry=theirs)
    train(optimizer, problem, 3)
    other, receiver = start(geometry=mine)
    train(receiver, other, 1)
    before = everything(receiver)
    with pytest.raises(ValueError, match="state"):
        receiver.load_state_dict(optimizer.state_dict())
    same(everything(receiver), before)
    train(receiver, other, 1)


@pytest.mark.parametrize("geometry", ["diagonal", "kfac", "dense"])
def test_a_learned_geometry_is_not_dropped_silently(geometry):
    problem, optimizer = start(geometry=geometry)
    train(optimizer, problem, 3)
    _, receiver = start(geometry="none")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            receiver.load_state_dict(optimizer.state_dict())
        except ValueError as error:
            assert "geometry" in str(error)
        else:
            assert any("geometry" in str(w.message) for w in found)


def test_another_block_size_is_refused():
    problem, optimizer = start()
    train(optimizer, problem, 3)
    other = mlp()
    receiver = optimizer_of(
        other, geometry=llqr_of("kfac", block_size=3), perturbation=llqr.FriendlySAM()
    )
    before = everything(receiver)
    with pytest.raises(ValueError, match="block_size 3"):
        receiver.load_state_dict(optimizer.state_dict())
    same(everything(receiver), before)


@pytest.mark.parametrize("groups", ["sizes", "count"])
def test_other_groups_are_refused_and_nothing_changes(groups):
    problem, optimizer = start()
    train(optimizer, problem, 3)
    other = mlp()
    parts = [list(other.model[0].parameters()), list(other.model[2].parameters())]
    if groups == "sizes":
        parts = [parts[0]]
    base = torch.optim.SGD([{"params": p} for p in parts], lr=0.1, momentum=0.9)
    receiver = optimizer_of(other, base, geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM())
    before = everything(receiver)
    with pytest.raises(ValueError, match="groups of sizes"):
        receiver.load_state_dict(optimizer.state_dict())
    same(everything(receiver), before)


@pytest.mark.parametrize("spoil", ["shape", "missing", "version", "memory"])
def test_a_spoiled_state_is_refused_and_nothing_changes(spoil):
    problem, optimizer = start()
    train(optimizer, problem, 3)
    state = copy.deepcopy(optimizer.state_dict())
    if spoil == "version":
        for group in state["param_groups"]:
            group["llqr.version"] = 99
    else:
        part = "llqr.perturbation." if spoil == "memory" else "llqr.geometry."
        i, key = next((i, k) for i, e in state["state"].items() for k in e if k.startswith(part))
        if spoil == "missing":
            del state["state"][i][key]
        else:
            state["state"][i][key] = torch.zeros(1, 1, 1)
    other, receiver = start()
    train(receiver, other, 1)
    before = everything(receiver)
    with pytest.raises(ValueError, match="format 99" if spoil == "version" else "state: "):
        receiver.load_state_dict(state)
    same(everything(receiver), before)


def test_when_the_base_refuses_nothing_changes():
    problem, optimizer = start()
    train(optimizer, problem, 3)
    other, receiver = start()
    train(receiver, other, 1)
    before = everything(receiver)

    def refuse(*_):
        raise RuntimeError("no")

    handle = receiver.base.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="no"):
        receiver.load_state_dict(optimizer.state_dict())
    handle.remove()
    same(everything(receiver), before)


def rising(step):
    return 0.1 + 0.01 * step


def test_a_schedule_in_a_group_does_not_stop_a_weights_only_load():
    def make():
        problem = mlp()
        group = {"params": list(problem.model.parameters()), "rho": rising}
        base = torch.optim.SGD([group], lr=0.1, momentum=0.9)
        return problem, optimizer_of(problem, base, perturbation=llqr.SAM(0.5))

    problem, optimizer = make()
    train(optimizer, problem, 3)
    checkpoint = through_file(
        {"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    again, fresh = make()
    again.model.load_state_dict(checkpoint["model"])
    fresh.load_state_dict(checkpoint["optimizer"])
    assert fresh.param_groups[0]["rho"] is rising
    train(optimizer, problem, 3)
    train(fresh, again, 3)
    same(again.model.state_dict(), problem.model.state_dict())
