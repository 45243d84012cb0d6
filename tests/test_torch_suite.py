"""torch's own table of optimizers and their settings, run through llqr.Optimizer.

``torch.testing._internal.common_optimizers.optim_db`` lists each optimizer with the settings,
implementations and schedulers that torch tests it with. A row here is a base x geometry x
perturbation; the 12 combinations of a base go round its settings, so each setting is met. The
checks are those of torch's ``test_optim.py``, in our own words.
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import pickle
import sys
import unittest
import weakref
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import llqr
from tiny import F64, Problem, close, everything, gradients, same, through_file, train, weights


def table_of_torch() -> Any:
    """Import optim_db without a trace in the process.

    Its module asks for expecttest, whose assertions are not used here, and forbids setting
    torch.backends' flags from then on.
    """
    stand_in: Any = ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    with patch.dict(os.environ), patch.object(torch.backends, "disable_global_flags"):
        sys.modules.setdefault("expecttest", stand_in)
        from torch.testing._internal.common_optimizers import optim_db
    if sys.modules["expecttest"] is stand_in:
        del sys.modules["expecttest"]
    return optim_db


TABLE = {info.name: info for info in table_of_torch()}
LEFT_OUT = {
    "LBFGS": "refused by name: it evaluates the closure several times a step",
    "SparseAdam": "refused by name: sparse gradients have no matrix view",
}
GEOMETRIES = ("none", "diagonal", "kfac", "e-kfac")
PERTURBATIONS = {
    "none": lambda: None,
    "SAM": lambda: llqr.SAM(0.05),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.05),
}
# As far apart as torch's own forms are: ASGD's loop keeps its rate in float32.
APART = {"ASGD": 1e-8}
REFUSED = ("maximize", "capturable", "differentiable")


@dataclass(frozen=True)
class Row:
    """A base with settings of torch's, a geometry and a perturbation."""

    base: str
    number: int
    geometry: str
    perturbation: str

    @property
    def info(self) -> Any:
        return TABLE[self.base]

    @property
    def settings(self) -> dict[str, Any]:
        """The row's settings: new objects, since a scheduler writes into a tensor."""
        return settings_of(self.base)[self.number]

    def optimizer(self, task: Problem, groups: Any = None, **more: Any) -> llqr.Optimizer:
        """Wrap a new base; ``more`` goes over the row's settings."""
        parameters = list(task.model.parameters()) if groups is None else groups
        base = self.info.optim_cls(parameters, **{**self.settings, **more})
        geometry = None
        if self.geometry != "none":
            geometry = llqr.LLQR(self.geometry, every=2, steps=1, lr=0.03, ema=0.5)
        return llqr.Optimizer(
            base, task.model, geometry=geometry, perturbation=PERTURBATIONS[self.perturbation]()
        )

    def task(self, dtype: torch.dtype = F64) -> Problem:
        """3-4-2 with tanh; without biases for a base that takes matrices only."""
        torch.manual_seed(0)
        bias = self.base != "Muon"
        model = nn.Sequential(nn.Linear(3, 4, bias), nn.Tanh(), nn.Linear(4, 2, bias)).to(dtype)
        return Problem(model, torch.randn(6, 3, dtype=dtype), torch.randint(2, (6,)))

    def pair(self, dtype: torch.dtype = F64, **more: Any) -> tuple[Problem, llqr.Optimizer]:
        task = self.task(dtype)
        return task, self.optimizer(task, **more)


def settings_of(base: str) -> list[dict[str, Any]]:
    """Torch's settings of an optimizer, without maximize, which is refused (tested below)."""
    found: list[dict[str, Any]] = []
    for given in TABLE[base].optim_inputs_func("cpu"):
        settings = {k: v for k, v in given.kwargs.items() if k != "maximize"}
        if settings not in found:
            found.append(settings)
    return found


def rows(*, fused: bool = False) -> list[Any]:
    """All rows, or those of bases that are fused on the CPU; a skipped one for a base left out."""
    found = []
    for base, info in TABLE.items():
        reason = LEFT_OUT.get(base)
        if reason is None and fused and "cpu" not in info.supports_fused_on:
            reason = f"torch.optim.{base} has no fused form on the CPU"
        if reason is not None:
            mark = pytest.mark.skip(reason=reason)
            found.append(pytest.param(Row(base, 0, "none", "none"), id=base, marks=mark))
            continue
        combinations = [(g, p) for g in GEOMETRIES for p in PERTURBATIONS]
        count = len(settings_of(base))
        assert count <= len(combinations)  # so each is met
        for i, (geometry, perturbation) in enumerate(combinations):
            row = Row(base, i % count, geometry, perturbation)
            found.append(pytest.param(row, id=f"{base}-{geometry}-{perturbation}"))
    return found


each_row = pytest.mark.parametrize("row", rows())
each_base = pytest.mark.parametrize("base", [b for b in TABLE if b not in LEFT_OUT])


def test_the_table_is_the_whole_one():
    """13 bases x 12 combinations, and the two that are refused."""
    assert len(rows()) == 13 * 12 + 2
    assert set(LEFT_OUT) < set(TABLE) and len(TABLE) == 15


# -- learning --------------------------------------------------------------------------------------


@each_row
def test_it_goes_in_the_right_direction_with_schedulers(row):
    """The loss falls, and the rates are those of the base without this library."""
    task, optimizer = row.pair()
    plain = row.info.optim_cls(row.task().model.parameters(), **row.settings)
    makers = row.info.scheduler_inputs[row.number % len(row.info.scheduler_inputs)]
    ours, theirs = [make(optimizer) for make in makers], [make(plain) for make in makers]
    losses, rates = [], []
    for _ in range(4):
        losses += train(optimizer, task, 1)
        plain.step()
        for scheduler in (*ours, *theirs):
            scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rates.append((float(optimizer.param_groups[0]["lr"]), float(plain.param_groups[0]["lr"])))
    assert losses[-1] < losses[0]
    assert all(a == b for a, b in rates)


@each_row
def test_foreach_and_fused_match_the_loop(row):
    forms = [f for f in ("foreach", "fused") if f in row.info.supported_impls]
    if "cpu" not in row.info.supports_fused_on:
        forms = [f for f in forms if f != "fused"]
    if not forms:
        pytest.skip(f"torch.optim.{row.base} has one form")
    if isinstance(row.settings.get("lr"), Tensor):
        forms.remove("foreach")  # torch: a tensor lr goes with foreach only if capturable
    ends = []
    for form in ({"foreach": False}, *({f: True} for f in forms)):
        task, optimizer = row.pair(**form)
        train(optimizer, task, 2)
        ends.append(weights(task.model))
    for end in ends[1:]:
        close(end, ends[0], APART.get(row.base, 1e-12))


def in_columns(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT


def every_second(weight: Tensor) -> Tensor:
    """An entry in between each two, as in torch's own test."""
    return torch.stack([weight, torch.zeros_like(weight)], -1)[..., 0]


@each_row
def test_parameters_that_are_not_contiguous(row):
    """Whatever their strides, parameters are updated as contiguous ones are."""
    task, optimizer = row.pair()
    train(optimizer, task, 2)
    cases: list[tuple[Any, dict[str, Any]]] = [(in_columns, {}), (every_second, {})]
    if "cpu" in row.info.supports_fused_on:
        # Not with entries in between: there torch's fused kernels update other entries, alone too.
        cases.append((in_columns, {"fused": True}))
    for arranged, form in cases:
        other = row.task()
        for layer in (other.model[0], other.model[2]):
            layer.weight = nn.Parameter(arranged(layer.weight.detach()))
            assert not layer.weight.is_contiguous()
        train(row.optimizer(other, **form), other, 2)
        close(weights(other.model), weights(task.model), 1e-12)


@each_row
def test_a_tensor_as_learning_rate(row):
    rate = float(row.settings.get("lr", row.info.optim_cls([torch.zeros(1, 1)]).defaults["lr"]))
    ends = []
    for lr in (rate, torch.tensor(rate, dtype=F64)):
        task = row.task()
        try:
            optimizer = row.optimizer(task, lr=lr)
        except ValueError as error:
            assert isinstance(lr, Tensor)
            pytest.skip(f"torch.optim.{row.base}: {error}")
        train(optimizer, task, 2)
        ends.append(weights(task.model))
    close(ends[1], ends[0], 1e-12)


@each_row
def test_nothing_to_do(row):
    """Without gradients nothing happens; with zeros only what the base does by itself."""
    task, optimizer = row.pair()
    start, known = weights(task.model), len(optimizer.state)
    optimizer.step()
    same(weights(task.model), start)
    assert len(optimizer.state) == known or row.base == "Adafactor"
    plain_task = row.task()
    plain = row.info.optim_cls(plain_task.model.parameters(), **row.settings)
    plain.step()  # Adafactor counts steps without gradients
    optimizer.refresh_if_due(task)
    for _ in optimizer.passes():
        sum(0 * p.sum() for p in task.model.parameters()).backward()
    optimizer.step()
    sum(0 * p.sum() for p in plain_task.model.parameters()).backward()
    plain.step()
    same(weights(task.model), weights(plain_task.model))


@each_row
def test_clearing_gradients(row):
    task, optimizer = row.pair()
    task.backward()
    assert all(g.any() for g in gradients(task.model).values())
    optimizer.zero_grad(set_to_none=False)
    assert all(g is not None and not g.any() for g in gradients(task.model).values())
    optimizer.zero_grad()
    assert all(g is None for g in gradients(task.model).values())


# -- state -----------------------------------------------------------------------------------------


@each_row
def test_a_state_dict_makes_the_round_trip(row):
    """Through a file that holds nothing but weights; training goes on bitwise."""
    task, optimizer = row.pair(torch.float32)
    train(optimizer, task, 2)
    state = optimizer.state_dict()
    same(through_file(state), state)
    again, loaded = row.pair(torch.float32)
    again.model.load_state_dict(task.model.state_dict())
    loaded.load_state_dict(through_file(state))
    same(everything(loaded), everything(optimizer))
    train(optimizer, task, 1)
    train(loaded, again, 1)
    same(everything(loaded), everything(optimizer))


@each_row
def test_state_dicts_of_an_older_torch(row):
    """Flags that came later are missing, and steps are counted in plain numbers."""
    task, optimizer = row.pair(torch.float32)
    train(optimizer, task, 1)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in row.info.not_og_supported_flags:
            group.pop(flag, None)  # SGD has no capturable, though the table says so
    for entry in old["state"].values():
        if isinstance(entry.get("step"), Tensor):
            entry["step"] = entry["step"].item()
    again, loaded = row.pair(torch.float32)
    again.model.load_state_dict(task.model.state_dict())
    loaded.load_state_dict(old)
    train(optimizer, task, 1)
    train(loaded, again, 1)
    close(weights(again.model), weights(task.model), 1e-6)


@each_row
def test_state_dicts_with_and_without_names(row):
    """From named parameters to plain ones, and back, as torch's own do."""
    task = row.task()
    optimizer = row.optimizer(task, groups=list(task.model.named_parameters()))
    train(optimizer, task, 1)
    plain_task, plain = row.pair()
    train(plain, plain_task, 1)
    for source, target in ((optimizer, plain), (plain, optimizer)):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert "param_names" in optimizer.state_dict()["param_groups"][0]
    train(optimizer, task, 1)
    train(plain, plain_task, 1)
    same(weights(plain_task.model), weights(task.model))


@each_row
def test_the_state_is_the_bases(row):
    """It is where torch keeps it, under torch's keys and on our parameters."""
    task, optimizer = row.pair()
    train(optimizer, task, 2)
    plain_task = row.task()
    plain = row.info.optim_cls(plain_task.model.parameters(), **row.settings)
    for _ in range(2):
        plain.zero_grad()
        plain_task.backward()
        plain.step()
    ours, theirs = ([list(e) for e in o.state.values()] for o in (optimizer, plain))
    assert ours == theirs
    if row.base == "SGD" and "momentum" not in row.settings:
        assert not any(k != "momentum_buffer" for keys in ours for k in keys)
    else:
        assert list(optimizer.state) == list(task.model.parameters())


@each_row
def test_copies_go_on_the_same(row):
    task, optimizer = row.pair()
    train(optimizer, task, 1)
    optimizer.mine = [1, 2]
    whole = (task, optimizer)
    copies = [copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
    train(optimizer, task, 1)
    for again, copied in copies:
        public = [{k for k in dir(o) if not k.startswith("_")} for o in (optimizer, copied)]
        assert public[0] == public[1] and copied.mine == [1, 2]
        train(copied, again, 1)
        same(everything(copied), everything(optimizer))


@each_row
def test_no_reference_leads_back(row):
    """Optimizer, model and gradients are free without the collector."""
    task, optimizer = row.pair()
    train(optimizer, task, 1)
    optimizer.state_dict()
    gone = [weakref.ref(o) for o in (optimizer, optimizer.base, task.model, task.model[0].weight)]
    gc.disable()
    try:
        del task, optimizer
        assert [r() for r in gone] == [None] * 4
    finally:
        gc.enable()


# -- groups ----------------------------------------------------------------------------------------


@each_row
def test_each_group_has_its_own_rate(row):
    """At rate 0 its parameters stay, weight decay included; the others move."""
    if row.base == "Rprop":
        pytest.skip("torch.optim.Rprop reads lr at its first step only")
    task = row.task()
    still, moving = ([*task.model[i].parameters()] for i in (0, 2))
    rate = row.settings.get("lr", 0.01)
    groups = [{"params": still, "lr": 0.0}, {"params": moving, "lr": rate}]
    start = weights(task.model)
    train(row.optimizer(task, groups=groups), task, 2)
    end = weights(task.model)
    assert torch.equal(end["0.weight"], start["0.weight"])
    assert not torch.equal(end["2.weight"], start["2.weight"])


@each_row
def test_each_group_has_its_own_weight_decay(row):
    """With a zero gradient it is all that acts, as on the base."""
    if row.base == "Rprop":
        pytest.skip("torch.optim.Rprop has no weight decay")
    ends = []
    for wrapped in (True, False):
        task = row.task()
        groups = [
            {"params": [*task.model[i].parameters()], "weight_decay": decay, "lr": 0.1}
            for i, decay in ((0, 0.0), (2, 0.3))
        ]
        if wrapped:
            optimizer = row.optimizer(task, groups=groups)
            optimizer.refresh_if_due(task)
            for _ in optimizer.passes():
                sum(0 * p.sum() for p in task.model.parameters()).backward()
        else:
            optimizer = row.info.optim_cls(groups, **row.settings)
            sum(0 * p.sum() for p in task.model.parameters()).backward()
        optimizer.step()
        ends.append(weights(task.model))
    same(ends[0], ends[1])


def adagrad_adds_groups() -> bool:
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    base = torch.optim.Adagrad([first])
    base.add_param_group({"params": [second]})
    second.grad = torch.ones(1)
    try:
        base.step()
    except KeyError:
        return False
    return True


@each_row
def test_a_group_is_added_on_the_way(row):
    """What is added trains from then on, with options of its own; a checkpoint has it."""
    task = row.task()
    first, second = ([*task.model[i].parameters()] for i in (0, 2))
    optimizer = row.optimizer(task, groups=first)
    start = weights(task.model)
    train(optimizer, task, 1)
    assert torch.equal(weights(task.model)["2.weight"], start["2.weight"])
    optimizer.add_param_group({"params": second, "lr": 0.05})
    if isinstance(optimizer.base, torch.optim.Adagrad) and not adagrad_adds_groups():
        pytest.skip("this torch's own Adagrad makes no state for a group that is added")
    train(optimizer, task, 2)
    assert not torch.equal(weights(task.model)["2.weight"], start["2.weight"])
    assert float(optimizer.param_groups[1]["lr"]) == 0.05
    again = row.task()
    groups = [{"params": [*again.model[i].parameters()]} for i in (0, 2)]
    loaded = row.optimizer(again, groups=groups)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.model.load_state_dict(task.model.state_dict())
    train(optimizer, task, 1)
    train(loaded, again, 1)
    close(weights(again.model), weights(task.model), 1e-6)  # float32 scalars are cast at load


# -- hooks -----------------------------------------------------------------------------------------


@each_row
def test_hooks_of_the_step(row):
    """Before and after, once per step of one pass or two, in order, until removed."""
    task, optimizer = row.pair()
    seen: list[str] = []

    def hook(name):
        def run(hooked, args, kwargs):
            assert hooked is optimizer and args == (optimizer,) and kwargs == {}
            seen.append(name)

        return run

    handles = [
        optimizer.register_step_pre_hook(hook("pre 1")),
        optimizer.register_step_post_hook(hook("post 1")),
        optimizer.register_step_pre_hook(hook("pre 2")),
        optimizer.register_step_post_hook(hook("post 2")),
    ]
    train(optimizer, task, 1)
    assert seen == ["pre 1", "pre 2", "post 1", "post 2"]
    for handle in handles:
        handle.remove()
    train(optimizer, task, 1)
    assert len(seen) == 4


@each_row
def test_hooks_of_state_dict_and_load_state_dict(row):
    """They fire in order, a prepended one first, and may replace what is saved or loaded."""
    task, optimizer = row.pair()
    train(optimizer, task, 1)
    seen: list[str] = []

    def saved(hooked, state):
        seen.append("saved")
        return {**state, "note": 7}

    def loading(hooked, state):
        seen.append("loading")
        assert state.pop("note") == 7
        return state

    optimizer.register_state_dict_pre_hook(lambda hooked: seen.append("saving"))
    optimizer.register_state_dict_pre_hook(lambda hooked: seen.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(lambda hooked: seen.append("loaded"))
    optimizer.register_load_state_dict_post_hook(lambda hooked: seen.append("1st"), prepend=True)
    before = weights(task.model)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["first", "saving", "saved", "loading", "1st", "loaded"]
    same(weights(task.model), before)


# -- a scaler, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("row", rows(fused=True))
def test_a_scaler_that_finds_an_infinity(row, when):
    """Fused bases look for it themselves within a step; nothing may move either way."""
    task, optimizer = row.pair(torch.float32, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    start, passes = weights(task.model), 1 + (row.perturbation != "none")
    optimizer.refresh_if_due(task)
    for i in optimizer.passes(scaler):
        scaler.scale(task.loss()).backward()
        if i == min(when, passes - 1):
            next(task.model.parameters()).grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    same(weights(task.model), start)
    assert scaler.get_scale() == 2.0**3
    optimizer.minimize(task, scaler=scaler)
    assert not torch.equal(weights(task.model)["2.weight"], start["2.weight"])


@each_base
@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_refused(base, option):
    kind = TABLE[base].optim_cls
    if option not in inspect.signature(kind).parameters:
        pytest.skip(f"torch.optim.{base} has no option {option}")
    task = Row(base, 0, "none", "SAM").task()
    plain = kind(task.model.parameters(), **{option: True})
    with pytest.raises(ValueError, match=f"base: {option}=True is not supported"):
        llqr.Optimizer(plain, task.model, perturbation=llqr.SAM(0.05))


@each_base
def test_complex_parameters_are_refused(base):
    model = nn.Linear(3, 2, bias=False, dtype=torch.complex64)
    plain = TABLE[base].optim_cls(model.parameters())
    with pytest.raises(ValueError, match="'weight' is complex"):
        llqr.Optimizer(plain, model)


@pytest.mark.parametrize("base", LEFT_OUT)
def test_bases_that_are_refused(base):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=f"base: {base} is not supported"):
        llqr.Optimizer(TABLE[base].optim_cls(model.parameters()), model)
