"""The checks of torch.optim's own suite, under its names, for base x geometry x perturbation.

What torch or this library does not offer for a row is skipped with the reason.
"""

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler

import llqr
from tables import (
    BASES,
    FUSED,
    GEOMETRIES,
    LEFT_OUT,
    MATRICES_ONLY,
    METRIC_AND_PROBE,
    NO_FOREACH,
    PERTURBATIONS,
    WITHOUT_MOMENTUM,
)
from tiny import (
    F64,
    Problem,
    close,
    everything,
    mlp,
    norm_net,
    optimizer_of,
    same,
    through_file,
    train,
    weights,
)

METHODS = {
    "base": ("none", "none"),
    "SAM": ("none", "SAM"),
    "LLQR": ("kfac", "none"),
    "LLQR+SAM": ("diagonal", "SAM"),
    "LLQR+F-SAM": ("e-kfac", "FriendlySAM"),
    "LLQR+ASAM": ("dense", "ASAM"),
    "LLQR+FisherSAM": ("scalar", "FisherSAM"),
    "MSAM": ("none", "MSAM"),
}
base_and_method = pytest.mark.parametrize(
    "base, method", [pytest.param(b, m, id=f"{b}-{m}") for b in BASES for m in METHODS]
)


def parameters_of(base, problem):
    named = problem.model.named_parameters()
    return [p for _, p in named if p.dim() == 2 or base not in MATRICES_ONLY]


def make(base, method="LLQR+SAM", problem=None, groups=None, **options):
    """A problem and its optimizer; options of the base go over the table's."""
    if base in LEFT_OUT:
        pytest.skip(LEFT_OUT[base])
    geometry, perturbation = method if isinstance(method, tuple) else METHODS[method]
    if perturbation == "MSAM" and base in WITHOUT_MOMENTUM:
        pytest.skip(f"torch.optim.{base} keeps no momentum, along which MSAM probes")
    problem = mlp() if problem is None else problem
    optimizer = BASES[base](parameters_of(base, problem) if groups is None else groups)
    if options:
        known = inspect.signature(type(optimizer)).parameters
        missing = [name for name in options if name not in known]
        if missing:
            pytest.skip(f"torch.optim.{type(optimizer).__name__} has no option {missing[0]}")
        first = {k: v for k, v in optimizer.defaults.items() if k in known}
        again = [{k: v for k, v in g.items() if k in ("params", "rho")} for g in groups or []]
        optimizer = type(optimizer)(again or parameters_of(base, problem), **{**first, **options})
    return problem, optimizer_of(
        problem,
        optimizer,
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )


# -- the whole product -----------------------------------------------------------------------------


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
@pytest.mark.parametrize("base", BASES)
def test_state_dict_deterministic(base, geometry, perturbation):
    """Two runs agree bitwise, and so does one that was saved and loaded on its way."""
    method = (geometry, perturbation)
    # NAdam and ASGD keep float32 scalars that torch casts at load, so float32 all the way.
    (one, first), (two, second), (three, third) = (
        make(base, method, mlp(torch.float32)) for _ in range(3)
    )
    train(first, one, 3)
    train(second, two, 3)
    same(everything(second), everything(first))
    three.model.load_state_dict(one.model.state_dict())
    third.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, one, 2)
    train(third, three, 2)
    same(everything(third), everything(first))


# -- base x method ---------------------------------------------------------------------------------


@base_and_method
def test_forloop_goes_right_direction(base, method):
    problem, optimizer = (
        make(base, method, foreach=False) if base not in NO_FOREACH else make(base, method)
    )
    losses = train(optimizer, problem, 15)
    assert losses[-1] < losses[0]


@base_and_method
def test_foreach_matches_forloop(base, method):
    if base in NO_FOREACH and base not in LEFT_OUT:
        pytest.skip(f"torch.optim.{base} chooses between them by itself")
    ends = []
    for foreach in (False, True):
        problem, optimizer = make(base, method, foreach=foreach)
        train(optimizer, problem, 4)
        ends.append(weights(problem.model))
    close(*ends, tolerance=1e-12)


@base_and_method
def test_fused_matches_forloop(base, method):
    if base not in FUSED and base not in LEFT_OUT:
        pytest.skip(f"torch.optim.{base.split('-')[0]} has no fused form on the CPU")
    ends = []
    for fused in (False, True):
        problem, optimizer = make(base, method, fused=fused)
        train(optimizer, problem, 4)
        ends.append(weights(problem.model))
    close(*ends, tolerance=1e-12)


@base_and_method
def test_param_groups_lr(base, method):
    """A group's lr is its own; at lr 0 its parameters stay, and the others do not."""
    problem = mlp()
    still, moving = problem.model[0], problem.model[2]
    groups = [
        {"params": [p for p in m.parameters() if p.dim() == 2 or base not in MATRICES_ONLY]}
        for m in (still, moving)
    ]
    groups[0]["lr"] = 0.0
    if base == "Rprop":
        pytest.skip("torch.optim.Rprop reads lr at its first step alone")
    problem, optimizer = make(base, method, problem, groups)
    start = weights(problem.model)
    train(optimizer, problem, 3)
    assert torch.equal(still.weight, start["0.weight"])
    assert not torch.equal(moving.weight, start["2.weight"])


@base_and_method
def test_param_groups_weight_decay(base, method):
    """Weight decay comes after U: with a zero gradient it is all that acts."""
    problem, plain = make(base, "base", weight_decay=0.1)
    start = weights(problem.model)
    for p in parameters_of(base, problem):
        p.grad = torch.zeros_like(p)
    plain.base.step()
    decayed = weights(problem.model)
    again, ours = make(base, method, weight_decay=0.1)
    if ours.refresh_due:
        ours.refresh(again)
    for _ in ours.passes():
        sum(0 * p.sum() for p in again.model.parameters()).backward()
    ours.step()
    same(weights(again.model), decayed)
    assert any(not torch.equal(decayed[n], start[n]) for n in start)


@base_and_method
def test_with_schedulers(base, method):
    problem, optimizer = make(base, method)
    start = optimizer.param_groups[0]["lr"]
    schedulers = [
        lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=2),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
        lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    losses = []
    for _ in range(10):
        losses += train(optimizer, problem, 1)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([losses[-1]] if plateau else []))
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(start * 0.9**15)


@base_and_method
def test_save_load_equality_with_weights_only(base, method):
    problem, optimizer = make(base, method)
    train(optimizer, problem, 3)
    same(through_file(optimizer.state_dict()), optimizer.state_dict())


@base_and_method
def test_deepcopy_copies_all_public_attrs(base, method):
    problem, optimizer = make(base, method)
    train(optimizer, problem, 3)
    optimizer.an_attribute_of_the_user = [1, 2]
    again, copied = copy.deepcopy((problem, optimizer))
    public = {k for k in dir(optimizer) if not k.startswith("_")}
    assert public == {k for k in dir(copied) if not k.startswith("_")}
    assert copied.an_attribute_of_the_user == [1, 2]
    train(optimizer, problem, 2)
    train(copied, again, 2)
    same(everything(copied), everything(optimizer))


@base_and_method
def test_step_is_noop_when_params_have_no_grad(base, method):
    problem, optimizer = make(base, method)
    start = weights(problem.model)
    known = len(optimizer.state)  # Adagrad makes its state at once, the others at their first step
    optimizer.step()
    same(weights(problem.model), start)
    assert len(optimizer.state) == known or base == "Adafactor"


@base_and_method
def test_step_is_noop_for_zero_grads(base, method):
    options = {} if base in ("Rprop", "LBFGS", "SparseAdam") else {"weight_decay": 0.0}
    if base == "ASGD":
        options["lambd"] = 0.0
    problem, optimizer = make(base, method, **options)
    start = weights(problem.model)
    if optimizer.refresh_due:
        optimizer.refresh(problem)
    for _ in optimizer.passes():
        sum(0 * p.sum() for p in problem.model.parameters()).backward()
    optimizer.step()
    same(weights(problem.model), start)
    assert optimizer.skipped_steps == optimizer.skipped_probes == 0


@base_and_method
def test_tensor_lr(base, method):
    problem, optimizer = make(base, method)
    other, tensors = make(base, method)
    for group in tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=F64)
    if base in ("Adafactor", "Muon"):
        pytest.skip(f"torch.optim.{base} computes a float from lr")
    train(optimizer, problem, 3)
    train(tensors, other, 3)
    close(weights(other.model), weights(problem.model), 1e-12)


@base_and_method
def test_optimizer_can_be_printed(base, method):
    problem, optimizer = make(base, method)
    text = repr(optimizer)
    assert repr(optimizer.base) in text and text.startswith("Optimizer (")
    train(optimizer, problem, 1)
    assert repr(optimizer)


@base_and_method
def test_non_empty_state(base, method):
    """The base's state is where torch keeps it, and holds nothing of ours."""
    problem, optimizer = make(base, method)
    train(optimizer, problem, 3)
    stateless = base == "SGD"
    assert (len(optimizer.state) == 0) is stateless or stateless
    keys = {k for entry in optimizer.state.values() for k in entry}
    assert not any(str(k).startswith("llqr") for k in keys)


@base_and_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(base, method, dtype):
    if base == "Adadelta" and dtype == torch.bfloat16:
        pytest.skip("torch.optim.Adadelta's first steps are below bfloat16's resolution")
    problem, optimizer = make(base, method, mlp(dtype))
    losses = train(optimizer, problem, 15)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in problem.model.parameters()} == {dtype}
    if optimizer.geometry is not None:
        kept = {v.dtype for e in optimizer.geometry.state().values() for v in e.values()}
        assert kept == {torch.float32}


class Cast(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.filterwarnings("ignore:a refresh was refused because J is below:UserWarning")
@base_and_method
def test_mixed_dtypes(base, method):
    """float64, float32 and bfloat16 parameters in one group."""
    problem = mlp()
    problem.model = torch.nn.Sequential(
        torch.nn.Linear(5, 6).double(),
        Cast(torch.bfloat16),
        torch.nn.Linear(6, 6).bfloat16(),
        Cast(torch.float32),
        torch.nn.Tanh(),
        torch.nn.Linear(6, 3),
    )
    problem, optimizer = make(base, method, problem)
    kinds = {n: p.dtype for n, p in problem.model.named_parameters()}
    losses = train(optimizer, problem, 15)
    assert losses[-1] < losses[0]
    assert kinds == {n: p.dtype for n, p in problem.model.named_parameters()}
    assert all(p.grad.dtype == p.dtype for p in parameters_of(base, problem))


@base_and_method
def test_a_network_with_statistics(base, method):
    problem = norm_net()
    if base in MATRICES_ONLY:
        pytest.skip(f"torch.optim.{base} takes matrices alone; this network has convolutions")
    problem, optimizer = make(base, method, problem)
    losses = train(optimizer, problem, 10)
    assert losses[-1] < losses[0]
    assert problem.model[1].num_batches_tracked == 10


def test_every_row_is_a_row():
    assert isinstance(mlp(), Problem)
    for name in BASES:
        if name not in LEFT_OUT:
            assert isinstance(make(name)[1], llqr.Optimizer)
