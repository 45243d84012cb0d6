"""What all measurements share: ways to hand over batches, traces left, inputs refused."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from explicit import F64, agree, gradient_and_hessian
from llqr import sharpness
from nets import case
from sharpness_nets import network, quadratic
from tiny import norm_net

SMALL = {
    "eigenvalues": lambda f, p, **o: sharpness.eigenvalues(f, p, max_products=200, **o).values[0],
    "trace": lambda f, p, **o: sharpness.trace(f, p, products=16, **o).value,
    "density": lambda f, p, **o: sharpness.density(f, p, steps=3, probes=2, **o).nodes[0, 0],
    "worst_case": lambda f, p, **o: sharpness.worst_case(f, p, steps=2, starts=2, **o).rise,
    "m_sharpness": lambda f, p, **o: sharpness.m_sharpness(f, p, **o).rise,
    "landscape": lambda f, p, **o: sharpness.landscape(f, p, 1, points=3, **o).losses[0],
}


@pytest.mark.parametrize("name", SMALL)
def test_batches_in_every_form_give_the_same(name):
    net = network()
    measure = SMALL[name]
    loader = DataLoader(TensorDataset(net.x, net.y), batch_size=8)
    expected = float(measure(net, net.model, batches=loader))
    parts = [(net.x[i : i + 8], net.y[i : i + 8]) for i in (0, 8, 16)]
    named = [{"x": x, "y": y} for x, y in parts]
    functions = [lambda part=part: net(part) for part in parts]
    assert float(measure(net, net.parameters, batches=iter(parts))) == expected
    assert float(measure(lambda b: net((b["x"], b["y"])), net.model, batches=named)) == expected
    assert float(measure(functions, net.model)) == expected
    assert float(measure(functions[0], net.model)) != expected


def test_weights_of_functions():
    net = network()
    functions = [lambda b=b: net(b) for b in net.batches]
    by_rows = sharpness.landscape(functions, net.model, 1, points=3, weights=[10, 8, 6])
    whole = sharpness.landscape(net, net.model, 1, points=3, batches=net.whole)
    agree(by_rows.losses, whole.losses)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_left_behind(name, raises):
    """Weights, buffers, p.grad, modes and random numbers; with BatchNorm and dropout training."""
    problem = norm_net(dropout=0.3)
    model, calls = problem.model.train(), []
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def forward(batch):
        calls.append(1)
        if raises and len(calls) == 4:
            raise KeyError("the user's")
        z = model(batch[0])
        return F.cross_entropy(z, batch[1]), z

    batches = [(problem.x[:3], problem.y[:3]), (problem.x[3:], problem.y[3:])]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    moments = [p.data_ptr() for p in model.parameters()]

    def measure():
        return SMALL[name](forward, list(model.parameters()), batches=batches)

    if raises:
        with pytest.raises(KeyError, match="the user's"):
            measure()
    else:
        assert float(measure()) == float(measure())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert moments == [p.data_ptr() for p in model.parameters()]


def test_frozen_parameters_are_left_out():
    net = copy.deepcopy(case("mlp").model)
    x, y = case("mlp").x, torch.tensor([0, 2, 1, 1, 0, 2])

    def loss():
        return F.cross_entropy(net(x), y)

    for p in net[0].parameters():
        p.requires_grad_(False)
    own = sharpness.trace(loss, net[2].parameters())
    found = sharpness.trace(loss, net, diagonal=True)
    assert found.value == own.value and found.dimension == 18
    assert [tuple(d.shape) for d in found.diagonal] == [tuple(p.shape) for p in net.parameters()]
    assert not found.diagonal[0].any() and found.diagonal[2].any()
    direction = [torch.ones_like(p) for p in net.parameters()]
    slices = sharpness.landscape(loss, net, [direction], points=3)
    assert not slices.directions[0][0].any()


def test_progress_and_log(caplog):
    net, seen = network(), []
    with caplog.at_level(logging.INFO, "llqr"):
        found = sharpness.trace(
            net,
            net.model,
            batches=net.batches,
            products=16,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(i, 16) for i in range(1, 17)]
    assert caplog.messages == [str(found)]


@pytest.mark.parametrize("name", SMALL)
def test_every_result_says_on_how_much_data_and_how_exactly(name, caplog):
    net = network()
    with caplog.at_level(logging.INFO, "llqr"):
        SMALL[name](net, net.model, batches=net.batches)
    assert "24 examples in 3 batches" in caplog.text
    between = {"density": "2 probes", "m_sharpness": "3 sub-batches"}.get(name, "3 batches")
    assert re.search(rf"rough standard error [\d.e-]+ between {between}", caplog.text), caplog.text


def bad_loss(value):
    w = nn.Parameter(torch.ones(3))
    return lambda: (w * value).sum(), [w]


@pytest.mark.parametrize("name", [n for n in SMALL if n != "landscape"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=f"loss of .*batch 0 is {value}"):
        SMALL[name](*bad_loss(value))


@pytest.mark.parametrize("measure", ["worst_case", "m_sharpness"])
def test_a_ball_that_leaves_the_finite_is_refused(measure):
    w = nn.Parameter(torch.tensor([0.01]))
    with pytest.raises(RuntimeError, match="not finite within rho|is nan after a step"):
        SMALL[measure](lambda: -w.log().sum(), [w], rho=0.05)
    assert float(w.detach()) == pytest.approx(0.01)


def test_a_product_that_is_not_finite_is_refused():
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    with pytest.raises(RuntimeError, match="curvature product is not finite"):
        sharpness.eigenvalues(lambda: (w.abs() ** 1.5).sum(), [w])


def refused():
    loss, ps = quadratic([1.0, 2.0])
    net = network()
    tied = [ps[0], ps[0]]
    s = sharpness
    pair = [[torch.zeros(2)], [torch.zeros(3)]]
    return {
        "k": (lambda: s.eigenvalues(loss, ps, 3), "k: 3 eigenvalues .* 2 parameters"),
        "k zero": (lambda: s.eigenvalues(loss, ps, 0), "k: expected an integer >= 1"),
        "which": (lambda: s.eigenvalues(loss, ps, which="top"), "which: expected one of largest"),
        "curvature": (lambda: s.trace(loss, ps, "hessian"), "curvature: expected 'fisher'"),
        "no outputs": (lambda: s.trace(loss, ps, "fisher"), "forward returned only a loss"),
        "products": (lambda: s.trace(loss, ps, products=5, sketch=2), "products: expected"),
        "twice": (lambda: s.trace(loss, tied), "parameters: number 1 is given twice"),
        "none": (lambda: s.trace(loss, []), "parameters: none of them requires grad"),
        "frozen": (lambda: s.trace(loss, [torch.zeros(2)]), "none of them requires grad"),
        "empty": (lambda: s.trace(net, net.model, batches=[]), "batches: there is none"),
        "weights": (lambda: s.trace(loss, ps, weights=[1, 2]), "weights: expected 1 numbers"),
        "m alone": (lambda: s.m_sharpness(loss, ps, m=2), "m: sub-batches can only be cut"),
        "m": (
            lambda: s.m_sharpness(net, net.model, m=11, batches=net.batches),
            "m: no batch has 11 rows",
        ),
        "rho": (lambda: s.worst_case(loss, ps, 0), "rho: expected a number > 0"),
        "norm": (lambda: s.worst_case(loss, ps, 1, "l1"), "norm: expected 'euclidean'"),
        "U": (
            lambda: s.worst_case(lambda: ps[0].sum(), ps, 1, lambda vs: [-v for v in vs]),
            "norm: g'Ug is -2.0",
        ),
        "result of U": (
            lambda: s.worst_case(loss, ps, 1, lambda vs: vs[0]),
            "norm: the function returned tensor.*, expected U v: a list of tensors of the shapes",
        ),
        "long": (lambda: s.eigenvalues(loss, ps, torch.zeros(9, 9)), "k: .*got <Tensor>"),
        "one direction": (
            lambda: s.landscape(loss, ps, list(torch.zeros(3, 2))),
            r"directions: expected 1 or 2.*goes in a list: \[direction\]",
        ),
        "no tensors": (lambda: s.landscape(loss, ps, [0.5]), "directions: number 0 is 0.5"),
        "points": (lambda: s.landscape(loss, ps, 1, points=4), "points: expected an odd number"),
        "directions": (lambda: s.landscape(loss, ps, 3), "directions: expected 1 or 2"),
        "shapes": (lambda: s.landscape(loss, ps, pair), "directions: number 1 has the shapes"),
        "leaf": (lambda: s.worst_case(loss, [ps[0] * 2]), "computed from others"),
    }


@pytest.mark.parametrize("name", refused())
def test_bad_arguments_are_refused(name):
    call, message = refused()[name]
    with pytest.raises(ValueError, match=message):
        call()


MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)
ROWS = (torch.ones(6, 2), torch.tensor([0, 1] * 3))


def loss():
    return F.cross_entropy(MODEL(ROWS[0]), ROWS[1])


def loss_of(batch):
    return F.cross_entropy(MODEL(batch[0]), batch[1])


SECOND = "pass the model, or a list of its parameters, as the second argument"
WRONG = {
    "an optimizer": ((loss, OPTIMIZER), {}, f"parameters: expected a module .*got <SGD>; {SECOND}"),
    "swapped": ((MODEL, loss), {}, f"parameters: .*got <function loss at .*; {SECOND}"),
    "a criterion": ((MODEL, nn.CrossEntropyLoss()), {}, f"none of them requires grad.*; {SECOND}"),
    "one tensor": ((loss, MODEL.weight), {}, f"parameters: .*got <Parameter>; {SECOND}"),
    "names": ((loss, MODEL.state_dict()), {}, "number 0 is 'weight', expected a tensor"),
    "pairs": ((loss, list(MODEL.named_parameters())), {}, "number 0 is <tuple>, expected a tensor"),
    "a loss": ((loss().detach(), MODEL), {}, "forward: .*got tensor.*pass lambda: criterion"),
    "no batches": ((loss_of, MODEL), {}, r"loss_of\(batch\) does not fit .*batches=\[...\] too"),
    "no argument": ((loss, MODEL), {"batches": [ROWS]}, r"loss\(\) does not fit .*with one batch"),
    "several": (([loss], MODEL), {"batches": [ROWS]}, "batches: with them forward is one function"),
    "a tensor": ((loss_of, MODEL), {"batches": ROWS[0]}, r"got <Tensor>; .*list, \[batch\]"),
    "a dict": ((loss_of, MODEL), {"batches": {"x": ROWS[0]}}, r"got <dict>; .*list, \[batch\]"),
    "weight": ((loss_of, MODEL), {"batches": [ROWS], "weights": 1.0}, "weights: .*got 1.0"),
    "progress": ((loss, MODEL), {"progress": True}, "progress: expected a function .*got True"),
    "another model": ((loss, nn.Linear(2, 2)), {}, "does not depend on any of the parameters"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", SMALL)
def test_wrong_calls_are_told_what_to_pass(name, wrong):
    """In one sentence, whatever the measurement; what prints long is named by its type."""
    arguments, options, message = WRONG[wrong]
    if (name, wrong) == ("landscape", "another model"):
        with pytest.warns(UserWarning, match="the loss is the same at all points"):
            SMALL[name](*arguments)
        return
    with pytest.raises((TypeError, ValueError), match=message) as told:
        SMALL[name](*arguments, **options)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("name", [n for n in SMALL if n != "m_sharpness"])
def test_a_seed_is_an_integer(name):
    with pytest.raises(ValueError, match="seed: expected an integer >= 0, got 1.5"):
        SMALL[name](loss, MODEL, seed=1.5)


@pytest.mark.parametrize("several", [False, True])
def test_buffers_that_change_the_loss_are_those_of_the_start(several):
    """Spectral norm moves its vectors in every forward; all products are of one matrix."""
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)
    ).double()
    x, y = torch.randn(8, 4, dtype=F64), torch.tensor([0, 1] * 4)

    def loss():
        return F.cross_entropy(model(x), y)

    forwards = [loss, loss] if several else loss
    found = sharpness.eigenvalues(forwards, model, 3, tolerance=1e-6)
    state = copy.deepcopy(model.state_dict())
    _, H = gradient_and_hessian(loss(), list(model.parameters()))
    model.load_state_dict(state)
    agree(found.values, torch.linalg.eigvalsh(H).flip(0)[:3], 1e-9)
    plane = sharpness.landscape(forwards, model, 1, points=3)
    assert torch.equal(plane.losses[1], loss().detach())


def test_autocast_is_switched_off_and_told():
    model = nn.Linear(4, 2)
    x, y = torch.randn(8, 4), torch.tensor([0, 1] * 4)

    def loss(autocast=True):
        with torch.autocast("cpu", enabled=autocast):
            return F.cross_entropy(model(x).float(), y)

    with pytest.warns(UserWarning, match="autocast is switched off") as told:
        found = sharpness.worst_case(loss, model, steps=2, starts=1)
    assert len(told) == 1
    assert found.rise == sharpness.worst_case(lambda: loss(False), model, steps=2, starts=1).rise


def test_outputs_of_transformers():
    class Output:
        def __init__(self, loss, logits):
            self.loss, self.logits = loss, logits

    net = network()
    plain = sharpness.trace(net, net.model, "fisher", batches=net.batches, products=16)
    found = sharpness.trace(
        lambda b: Output(*net(b)), net.model, "fisher", batches=net.batches, products=16
    )
    assert found.value == plain.value
