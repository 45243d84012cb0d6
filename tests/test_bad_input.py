"""Bad arguments and bad forwards: a clear error that names the thing; all else as before."""

import pytest
import torch
from torch import nn

import llqr
from tiny import (
    everything,
    llqr_of,
    mlp,
    optimizer_of,
    refused,
    same,
    says,
    sgd,
    train,
)

NAN, INF = float("nan"), float("inf")


# -- arguments of constructors ---------------------------------------------------------------------


def wrong(cls, name, *values):
    return [pytest.param(cls, name, v, id=f"{cls.__name__}-{name}-{v!r}") for v in values]


@pytest.mark.parametrize(
    "cls, name, value",
    [
        *wrong(llqr.LLQR, "structure", "foo", "KFAC", None, 3),
        *wrong(llqr.LLQR, "curvature", "foo", None, 2),
        *wrong(llqr.LLQR, "every", 0, -1, "often", NAN, None),
        *wrong(llqr.LLQR, "steps", 0, -1, 1.5, True, "50"),
        *wrong(llqr.LLQR, "lr", 0, -1e-3, NAN, INF, "1e-2"),
        *wrong(llqr.LLQR, "momentum", 1, -0.1, NAN),
        *wrong(llqr.LLQR, "clip", 0, -1, NAN, "5"),
        *wrong(llqr.LLQR, "ema", 1, -0.1, 1.5, NAN),
        *wrong(llqr.LLQR, "damping", -1, NAN, INF),
        *wrong(llqr.LLQR, "scale", "foo", 0, -1, NAN, INF, None),
        *wrong(llqr.LLQR, "bases", "identity", None),
        *wrong(llqr.LLQR, "constraint", "foo", None),
        *wrong(llqr.LLQR, "bounds", (2, 3), (0, 1e3), (-1, 1), (1,), (0.5, INF), 5, None, (1, 1)),
        *wrong(llqr.LLQR, "block_size", 0, -1, 2.5, "512"),
        *wrong(llqr.LLQR, "tolerance", -1, 1e-9, 1, NAN, None),
        *wrong(llqr.LLQR, "solver", "foo", None),
        *wrong(llqr.LLQR, "application", "half", None),
        *wrong(llqr.LLQR, "start", -1, 1.5, None),
        *wrong(llqr.LLQR, "max_failures", -1, 0.5, "3"),
        *wrong(llqr.LLQR, "renew_every", 0, None),
        *wrong(llqr.SAM, "rho", -1, NAN, INF, "0.05", None, True),
        *wrong(llqr.SAM, "norm", "foo", None, 2),
        *wrong(llqr.SAM, "direction", "normalized", None),
        *wrong(llqr.SAM, "along", "metrik", None),
        *wrong(llqr.SAM, "start", -1, 0.5, None),
        *wrong(llqr.SAM, "interval", 0, -1, 0.5, None, True),
        *wrong(llqr.ASAM, "rho", -1, NAN),
        *wrong(llqr.ASAM, "eta", -1, NAN, INF),
        *wrong(llqr.FisherSAM, "rho", -1, NAN),
        *wrong(llqr.FisherSAM, "eta", 0, -1, NAN),
        *wrong(llqr.FisherSAM, "form", "Kim", None),
        *wrong(llqr.FriendlySAM, "rho", -1, NAN),
        *wrong(llqr.FriendlySAM, "memory_start", "g", None),
        *wrong(llqr.FriendlySAM, "sigma", -1, NAN, "1"),
        *wrong(llqr.FriendlySAM, "decay", 1, -0.1, NAN),
        *wrong(llqr.FriendlySAM, "norm", "foo"),
        *wrong(llqr.LookSAM, "alpha", -1, NAN, None),
        *wrong(llqr.GSAM, "alpha", -1, NAN, None),
        *wrong(llqr.WSAM, "gamma", 1, -0.1, NAN),
        *wrong(llqr.ESAM, "beta", 0, 1.5, NAN, None),
        *wrong(llqr.ESAM, "seed", -1, 0.5, None),
        *wrong(llqr.MSAM, "rho", -1, NAN),
        *wrong(llqr.MSAM, "interval", 0),
    ],
)
def test_a_wrong_value_is_named_with_its_argument(cls, name, value):
    shown = repr(value).strip("()").partition(",")[0]
    with says((ValueError, TypeError), f"{name}: ", shown.replace("[", "")):
        cls(**{name: value})


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("geometry", "kfac", TypeError),
        ("geometry", llqr.SAM(), TypeError),
        ("geometry", llqr.LLQR, TypeError),
        ("perturbation", 0.05, TypeError),
        ("perturbation", llqr.SAM, TypeError),
        ("buffers", "dirty", ValueError),
        ("buffers", None, ValueError),
        ("refresh_forward", 3, TypeError),
        ("transport", "False", TypeError),
        ("graft", "no", TypeError),
        ("graft", 1, TypeError),
        ("replay_rng", None, TypeError),
    ],
)
def test_arguments_of_the_optimizer(name, value, error):
    problem = mlp()
    with says(error, f"{name}: "):
        optimizer_of(problem, **{name: value})


def test_base_and_model():
    problem = mlp()
    base = sgd(problem)
    for bad in (None, problem.model, torch.optim.SGD):
        with says(TypeError, "base: expected"):
            llqr.Optimizer(bad, problem.model)
    with says(TypeError, "base: expected"):
        llqr.Optimizer(llqr.Optimizer(base, problem.model), problem.model)
    for bad in (None, list(problem.model.parameters()), nn.Linear):
        with says(TypeError, "model: expected"):
            llqr.Optimizer(base, bad)
    with pytest.raises(TypeError):
        llqr.Optimizer(base, problem.model, llqr.LLQR())  # options are keywords


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_bases_that_are_refused_by_name(name):
    problem = mlp()
    with says(TypeError, f"base: {name}"):
        llqr.Optimizer(getattr(torch.optim, name)(problem.model.parameters()), problem.model)


@pytest.mark.parametrize("option", ["maximize", "capturable", "differentiable"])
def test_options_of_the_base_that_are_refused(option):
    problem = mlp()
    base = torch.optim.Adam(problem.model.parameters(), **{option: True})
    with says(ValueError, f"{option}=True"):
        llqr.Optimizer(base, problem.model)


def test_parameters_that_the_model_does_not_have():
    problem, stranger = mlp(), mlp(seed=1)
    both = [*problem.model.parameters(), stranger.model[0].weight]
    with says(ValueError, "base: ", r"\(6, 5\)", "model.parameters"):
        llqr.Optimizer(torch.optim.SGD(both, lr=0.1), problem.model)
    with says(ValueError, "base: "):
        llqr.Optimizer(sgd(stranger), problem.model)


@pytest.mark.parametrize(
    "kind, value",
    [
        ("complex", torch.zeros(2, dtype=torch.complex64)),
        ("sparse", torch.zeros(2, 2).to_sparse()),
        ("torch.int32", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_parameters_of_a_kind_that_is_refused(kind, value):
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(value, requires_grad=kind != "torch.int32")
    with says(ValueError, "odd", kind):
        llqr.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("rho", [-1.0, NAN, INF, "big", None])
def test_a_bad_radius_of_a_group(rho):
    problem = mlp()
    good, bad = (list(problem.model[i].parameters()) for i in (0, 2))
    base = torch.optim.SGD([{"params": good}, {"params": bad, "rho": rho}], lr=0.1)
    before = everything(llqr.Optimizer(base, problem.model))
    with says((ValueError, TypeError), "rho: ", "group 1", repr(rho)):
        llqr.Optimizer(base, problem.model, perturbation=llqr.SAM()).minimize(problem)
    same(everything(llqr.Optimizer(base, problem.model)), before)


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_a_radius_schedule_that_goes_wrong(value):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(lambda t: 0.1 if t < 2 else value))
    train(optimizer, problem, 2)
    with refused(optimizer, ValueError, "rho: ", str(value)):
        optimizer.minimize(problem)


@pytest.mark.parametrize(
    "name, value", [("lr", -1.0), ("lr", NAN), ("ema", 1.5), ("ema", -0.5), ("every", 0)]
)
def test_a_schedule_of_the_geometry_that_goes_wrong(name, value):
    problem = mlp()
    good = {"lr": 0.03, "ema": 0.5, "every": 2}[name]
    geometry = llqr_of(**{name: lambda step: good if step < 2 else value})
    optimizer = optimizer_of(problem, geometry=geometry)
    train(optimizer, problem, 2)
    with refused(optimizer, ValueError, f"{name}: ", str(value)):
        optimizer.minimize(problem)


@pytest.mark.parametrize(
    "U, parts",
    [
        (torch.eye(3), ["U: expected shape", "57"]),
        (torch.ones(57, 57), ["positive definite"]),
        (torch.eye(57).tril() + torch.ones(57, 57).tril(-1), ["symmetric"]),
        (torch.full((57, 57), NAN), ["U: ", "not finite"]),
        ({"nobody": torch.tensor(1.0)}, ["nobody"]),
        ({"0.bias": torch.tensor(-1.0)}, ["0.bias", "positive"]),
        ({"0.bias": torch.zeros(6)}, ["0.bias", "positive"]),
        ({"0.bias": torch.ones(5)}, ["0.bias", r"\(5,\)"]),
        ({"0.bias": -torch.eye(6)}, ["0.bias", "positive definite"]),
        ({"0.bias": torch.full((6,), INF)}, ["0.bias", "not finite"]),
        ({"0.bias": 2.0}, ["0.bias", "2.0"]),
        (torch.eye(57, dtype=torch.complex64), ["U: ", "real"]),
    ],
)
def test_a_fixed_metric_that_is_none(U, parts):
    problem = mlp()
    with says((ValueError, TypeError), *parts):
        optimizer_of(problem, geometry=llqr.FixedGeometry(U))


def test_a_structure_callable_that_returns_nonsense():
    problem = mlp()
    with says(ValueError, "structure", "foo", "0.weight"):
        optimizer_of(problem, geometry=llqr.LLQR(lambda name, parameter: "foo"))


def test_a_divergence_that_is_none():
    with says(TypeError, "divergence: "):
        llqr.Divergence("kl")
