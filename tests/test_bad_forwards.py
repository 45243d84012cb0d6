"""Bad forwards, gradients and scalers: a clear error that names the thing; all else as before."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import llqr
from tables import PERTURBATIONS
from tiny import (
    F64,
    Problem,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    refused,
    same,
    sgd,
    train,
    weights,
)

NAN, INF = float("nan"), float("inf")


def bad_forwards(problem):
    z = problem.model(problem.x)
    loss = nn.functional.cross_entropy
    return {
        "a vector": (lambda: loss(problem.model(problem.x), problem.y, reduction="none"), "scalar"),
        "no graph": (lambda: problem.loss().detach(), "graph"),
        "a number": (lambda: float(problem.loss().detach()), "float"),
        "nothing": (lambda: None, "NoneType"),
        "three values": (lambda: (problem.loss(), z, z), "3 values"),
        "the outputs first": (lambda: problem()[::-1], "scalar"),
        "no_grad": (torch.no_grad()(problem.loss), "graph"),
    }


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("kind", bad_forwards(mlp()))
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_minimize_refuses_a_bad_forward(perturbation, kind, when):
    """Also where only the second micro-batch is bad."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=PERTURBATIONS[perturbation]())
    train(optimizer, problem, 2)
    forward, part = bad_forwards(problem)[kind]
    with refused(optimizer, ValueError, "forward: ", part):
        optimizer.minimize(forward if when == 1 else [problem, forward])
    train(optimizer, problem, 1)


@pytest.mark.parametrize("kind", bad_forwards(mlp()))
@pytest.mark.parametrize("way", ["minimize", "refresh"])
def test_a_refresh_refuses_a_bad_forward(way, kind):
    problem = norm_net()
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"))
    train(optimizer, problem, 2)
    forward, part = bad_forwards(problem)[kind]
    with refused(optimizer, ValueError, "forward: ", part):
        optimizer.refresh(forward) if way == "refresh" else optimizer.minimize(forward)
    train(optimizer, problem, 1)


@pytest.mark.parametrize("forward", [None, 3, [], [None], "model", torch.zeros(())])
def test_what_is_not_a_forward(forward):
    problem = mlp()
    optimizer = optimizer_of(problem)
    with refused(optimizer, TypeError, "forward: expected a function"):
        optimizer.minimize(forward)


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [1, -1], [0, 0], [NAN, 1], [INF, 1], []])
def test_bad_weights(weights):
    problem = mlp()
    for options in ({}, {"geometry": llqr_of(), "perturbation": llqr.SAM()}):
        optimizer = optimizer_of(problem, **options)
        parts = [problem.part(0, 6), problem.part(6, 12)]
        with refused(optimizer, ValueError, "weights: "):
            optimizer.minimize(parts, weights=weights)


def test_fisher_needs_outputs():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    with refused(optimizer, ValueError, "only a loss", "Fisher", "logits"):
        optimizer.minimize(problem.loss)
    newton = optimizer_of(problem, geometry=llqr_of(curvature="newton"))
    newton.minimize(problem.loss)


@pytest.mark.parametrize(
    "outputs, part",
    [
        (lambda p, z: z.detach(), "outputs"),
        (lambda p, z: None, "only a loss"),
        (lambda p, z: z.clone(), "not computed from"),
        (lambda p, z: p.model(p.x), "not computed from"),
        (lambda p, z: "logits", "outputs"),
        (lambda p, z: {}, "outputs"),
    ],
)
def test_outputs_that_are_not_what_the_loss_was_computed_from(outputs, part):
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())

    def forward():
        z = problem.model(problem.x)
        return nn.functional.cross_entropy(z, problem.y), outputs(problem, z)

    with refused(optimizer, ValueError, part):
        optimizer.minimize(forward)


@pytest.mark.parametrize(
    "linear",
    [
        lambda z, y: (nn.functional.nll_loss(logp := z.log_softmax(-1), y), logp),
        lambda z, y: ((z - 10).abs().mean(), z),
        lambda z, y: ((1 - z.gather(1, y[:, None])).relu().mean(), z),
    ],
    ids=["log-probabilities", "L1", "hinge"],
)
def test_a_loss_that_is_linear_in_the_outputs(linear):
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    with refused(optimizer, ValueError, "linear in `outputs`", "logits"):
        optimizer.minimize(lambda: linear(problem.model(problem.x), problem.y))


def test_a_forward_of_another_model():
    problem, other = mlp(), mlp(seed=1)
    for options in ({}, {"perturbation": llqr.FriendlySAM()}, {"geometry": llqr_of()}):
        optimizer = optimizer_of(problem, **options)
        with refused(optimizer, (ValueError, RuntimeError), "depend|no parameter"):
            optimizer.minimize(other)
        if "geometry" in options:
            with refused(optimizer, (ValueError, RuntimeError), "depend|no parameter"):
                optimizer.refresh(other)


def test_no_gradients_at_all():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM())
    train(optimizer, problem, 1)
    with refused(optimizer, RuntimeError, "no parameter has a gradient", "backward"):
        for _ in optimizer.passes():
            problem.loss()
    with refused(optimizer, RuntimeError, "no parameter has a gradient", "second"):
        for i in optimizer.passes():
            problem.loss() if i else problem.backward()
    with refused(optimizer, RuntimeError, "no parameter has a gradient"):
        optimizer.step(lambda: problem.loss())
    optimizer.zero_grad()
    with refused(optimizer, RuntimeError, "no parameter has a gradient", "clean"):
        with optimizer.perturbed():
            problem.backward()
    problem.backward()
    with refused(optimizer, RuntimeError, "no parameter has a gradient", "second"):
        with optimizer.perturbed():
            pass
    train(optimizer, problem, 1)


@pytest.mark.parametrize("geometry", [None, "diagonal"])
@pytest.mark.parametrize("way", ["minimize", "step"])
def test_sparse_gradients(way, geometry):
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)).to(F64)
    problem = Problem(model, torch.randint(7, (12,)), torch.randint(3, (12,)))
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=geometry and llqr_of(geometry, start=9)
    )
    with refused(optimizer, ValueError, "0.weight", "sparse=False"):
        if way == "minimize":
            optimizer.minimize(problem)
        else:
            problem.backward()
            optimizer.step()


def test_refresh_without_a_geometry_or_a_forward():
    problem = mlp()
    optimizer = optimizer_of(problem)
    with refused(optimizer, RuntimeError, "geometry"):
        optimizer.refresh(problem)
    assert optimizer.refresh_if_due() is None and not optimizer.refresh_due
    optimizer = optimizer_of(problem, geometry=llqr_of())
    with refused(optimizer, ValueError, "forward", "refresh_forward"):
        optimizer.refresh()
    fixed = optimizer_of(problem, geometry=llqr.FixedGeometry({}))
    with refused(fixed, RuntimeError, "FixedGeometry", "refresh"):
        fixed.refresh(problem)


@pytest.mark.parametrize("scaler", [1024.0, "cpu", torch.amp.GradScaler])
def test_what_is_not_a_scaler(scaler):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    with refused(optimizer, TypeError, "scaler: "):
        optimizer.minimize(problem, scaler=scaler)
    with refused(optimizer, TypeError, "scaler: "):
        for _ in optimizer.passes(scaler):
            problem.backward()


@dataclass
class Output:
    """A dataclass as many models return it; pytree does not look inside."""

    logits: object
    loss: object = None


class Named(dict):
    """Like transformers' ModelOutput: a dict whose entries are attributes too."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("kind", ["dataclass", "named", "pair", "dict"])
def test_model_outputs_are_unpacked(kind):
    problem, plain = mlp(), mlp()
    options = {"perturbation": llqr.SAM(0.1)}
    optimizer = optimizer_of(problem, geometry=llqr_of(), **options)
    twin = optimizer_of(plain, geometry=llqr_of(), **options)

    def forward():
        loss, z = problem()
        return {
            "dataclass": Output(z, loss),
            "named": Named(logits=z, loss=loss),
            "pair": (loss, Output(z)),
            "dict": (loss, {"logits": z}),
        }[kind]

    for _ in range(3):
        optimizer.minimize(forward)
    train(twin, plain, 3)
    same(weights(problem.model), weights(plain.model))


def test_outputs_without_a_tensor_are_named():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    with refused(optimizer, ValueError, "forward: no tensor found", "Output", "logits"):
        optimizer.refresh(lambda: (problem.loss(), Output(None)))


def test_an_error_of_the_users_own_comes_through():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(), geometry=llqr_of())
    train(optimizer, problem, 1)
    for name in ("forward", "refresh", "before_step"):

        def fail(name=name):
            raise KeyError(name)

        with refused(optimizer, KeyError, name):
            if name == "before_step":
                optimizer.minimize(problem, before_step=fail)
            elif name == "refresh":
                optimizer.refresh(fail)
            else:
                optimizer.minimize(fail)
    train(optimizer, problem, 3)
