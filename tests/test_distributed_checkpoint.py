"""torch.distributed.checkpoint, in one process: its state dicts have names for keys."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import llqr
from tables import BASES, GEOMETRIES, PERTURBATIONS
from tiny import everything, llqr_of, norm_net, optimizer_of, same, sgd, train

pytestmark = [
    # What torch itself warns of in one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning"),
]
WITHOUT_STATE, WITH_STATE = "SGD", "AdamW"


def start(base=WITHOUT_STATE, geometry="kfac", perturbation="FriendlySAM", frozen=(), steps=0):
    problem = norm_net()
    optimizer = optimizer_of(
        problem,
        BASES[base](problem.model.parameters()),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )
    for name in frozen:
        problem.model.get_parameter(name).requires_grad_(False)
    train(optimizer, problem, steps)
    return problem, optimizer


def goes_on_alike(one, two, steps=4):
    for problem, optimizer in (one, two):
        train(optimizer, problem, steps)
    same(everything(two[1]), everything(one[1]))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("perturbation", ["SAM", "FriendlySAM"])
@pytest.mark.parametrize("base", [WITHOUT_STATE, WITH_STATE])
def test_get_and_set(base, perturbation, geometry, steps):
    problem, optimizer = start(base, geometry, perturbation, steps=steps)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer))
    names = {name for name, _ in problem.model.named_parameters()}
    assert set(state["state"]) <= names
    assert set(state["param_groups"][0]["params"]) == names
    other, fresh = start(base, geometry, perturbation)
    other.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(other.model, fresh, state)
    goes_on_alike((problem, optimizer), (other, fresh))


@pytest.mark.parametrize("base", [WITHOUT_STATE, WITH_STATE])
def test_saving_changes_nothing(base):
    """torch steps a stateless base with zero gradients at lr 0, each time it is asked."""
    (problem, optimizer), (other, undisturbed) = start(base), start(base)
    for _ in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if base == WITHOUT_STATE or optimizer.state:  # torch makes the first state of AdamW
                get_optimizer_state_dict(problem.model, optimizer)
        train(optimizer, problem, 1)
        train(undisturbed, other, 1)
    same(everything(optimizer), everything(undisturbed))


@pytest.mark.parametrize("geometry", ["diagonal", "e-kfac", "dense"])
@pytest.mark.parametrize("base", [WITHOUT_STATE, WITH_STATE])
def test_save_and_load_through_files(base, geometry, tmp_path):
    problem, optimizer = start(base, geometry, steps=3)
    model_state, optimizer_state = get_state_dict(problem.model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    other, fresh = start(base, geometry)
    model_state, optimizer_state = get_state_dict(other.model, fresh)
    template = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(template, checkpoint_id=tmp_path)
    set_state_dict(
        other.model,
        fresh,
        model_state_dict=template["model"],
        optim_state_dict=template["optimizer"],
    )
    assert fresh.last_report == optimizer.last_report
    assert fresh.geometry.counters() == optimizer.geometry.counters()
    goes_on_alike((problem, optimizer), (other, fresh))


@pytest.mark.parametrize("base", [WITHOUT_STATE, WITH_STATE])
def test_full_state_dict_on_the_cpu(base):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    problem, optimizer = start(base, steps=3)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer, options=options))
    other, fresh = start(base)
    other.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(other.model, fresh, state, options=options)
    goes_on_alike((problem, optimizer), (other, fresh))


@pytest.mark.parametrize("geometry", ["diagonal", "kfac"])
@pytest.mark.parametrize("base", [WITHOUT_STATE, WITH_STATE])
def test_a_frozen_parameter(base, geometry):
    """torch drops the state of parameters that do not require a gradient."""
    options = {"base": base, "geometry": geometry, "frozen": ["0.weight"]}
    problem, optimizer = start(steps=3, **options)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer))
    other, fresh = start(**options)
    other.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(other.model, fresh, state)
    for p in (problem, other):
        p.calls = 0
    train(optimizer, problem, 4)
    train(fresh, other, 4)
    same(other.model.state_dict(), problem.model.state_dict())


def test_two_groups():
    def make():
        problem = norm_net()
        groups = [
            {"params": list(problem.model[5].parameters()), "lr": 0.02},
            {"params": list(problem.model[0].parameters()), "rho": 0.0},
            {"params": list(problem.model[1].parameters())},
        ]
        base = torch.optim.SGD(groups, lr=0.1)
        return problem, optimizer_of(
            problem, base, geometry=llqr_of("kfac"), perturbation=llqr.FriendlySAM(0.1)
        )

    problem, optimizer = make()
    train(optimizer, problem, 3)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer))
    other, fresh = make()
    other.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(other.model, fresh, state)
    goes_on_alike((problem, optimizer), (other, fresh))


def test_a_part_of_the_model():
    def make():
        problem = norm_net()
        base = torch.optim.SGD(problem.model[5].parameters(), lr=0.1)
        return problem, optimizer_of(problem, base, geometry=llqr_of("kfac"))

    problem, optimizer = make()
    train(optimizer, problem, 3)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer))
    other, fresh = make()
    other.model.load_state_dict(problem.model.state_dict())
    set_optimizer_state_dict(other.model, fresh, state)
    goes_on_alike((problem, optimizer), (other, fresh))


def test_the_flattened_form_says_what_it_loses():
    """torch unflattens by the keys of the live base state, so ours cannot come through."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    problem, optimizer = start(WITH_STATE, steps=3)
    state = copy.deepcopy(get_optimizer_state_dict(problem.model, optimizer, options=options))
    other, fresh = start(WITH_STATE)
    with pytest.warns(UserWarning, match="geometry and the perturbation stay as they are"):
        set_optimizer_state_dict(other.model, fresh, state, options=options)
    same(fresh.base.state_dict(), optimizer.base.state_dict())


def test_a_base_alone_is_as_it_is_without_us():
    problem, plain = norm_net(), norm_net()
    optimizer = optimizer_of(problem, sgd(problem, momentum=0.9))
    base = sgd(plain, momentum=0.9)
    train(optimizer, problem, 2)
    train(optimizer_of(plain, base), plain, 2)
    ours = get_optimizer_state_dict(problem.model, optimizer)
    theirs = get_optimizer_state_dict(plain.model, base)
    for group in ours["param_groups"]:
        for key in [k for k in group if k.startswith("llqr.")]:
            del group[key]
    for entry in ours["state"].values():
        for key in [k for k in entry if k.startswith("llqr.")]:
            del entry[key]
    same(ours, theirs)
