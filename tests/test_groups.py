"""Parameters that come, go, freeze, lack a gradient, or come in groups and odd shapes."""

import copy

import pytest
import torch
from torch import nn

import llqr
from tables import GEOMETRIES, METRIC_AND_PROBE, PERTURBATIONS, SAMPLED
from tiny import (
    F64,
    STRUCTURES,
    WAYS,
    Problem,
    everything,
    gradients,
    llqr_of,
    mlp,
    natural_of,
    optimizer_of,
    same,
    sgd,
    train,
    weights,
)

PROBES = [name for name in PERTURBATIONS if name != "none"]


# -- add_param_group -------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_a_group_may_join(geometry, perturbation):
    """Its blocks start at the identity; what is known of the others stays."""
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        torch.optim.SGD(problem.model[0].parameters(), lr=0.1, momentum=0.9),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )
    train(optimizer, problem, 3)
    old = copy.deepcopy(optimizer.geometry.state()) if geometry != "none" else {}
    memory = copy.deepcopy(optimizer.perturbation.state()) if optimizer.perturbation else {}
    late = mlp().model[2].weight.detach()
    optimizer.add_param_group({"params": list(problem.model[2].parameters()), "lr": 0.01})
    assert [g["lr"] for g in optimizer.base.param_groups] == [0.1, 0.01]
    assert optimizer.param_groups[1]["momentum"] == 0.9
    for name, entry in old.items():
        same(optimizer.geometry.state()[name], entry)
    for name, entry in memory.items():
        same(optimizer.perturbation.state()[name], entry)
    if geometry != "none":
        g = problem.gradient()
        new = {n: g[n] for n in ("2.weight", "2.bias")}
        same(optimizer.geometry.apply(new), new)
    train(optimizer, problem, 3)
    assert not torch.equal(problem.model[2].weight, late)
    fresh, other = copy.deepcopy((optimizer, problem))
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.model = fresh.model
    train(fresh, other, 2)
    train(optimizer, problem, 2)
    same(everything(fresh), everything(optimizer))


def test_a_group_with_a_radius_of_its_own():
    problem = mlp()
    optimizer = optimizer_of(
        problem, torch.optim.SGD(problem.model[0].parameters(), lr=0.1), perturbation=llqr.SAM(0.1)
    )
    optimizer.add_param_group({"params": list(problem.model[2].parameters()), "rho": 0.0})
    start = weights(problem.model)
    for i in optimizer.passes():
        problem.backward()
        if i:
            moved = {n for n, p in problem.model.named_parameters() if not torch.equal(p, start[n])}
    optimizer.step()
    assert moved == {"0.weight", "0.bias"}


@pytest.mark.parametrize("bad", ["stranger", "twice", "maximize", "complex"])
def test_a_bad_group_is_refused_and_nothing_changes(bad):
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        sgd(problem, momentum=0.9),
        geometry=llqr_of("kfac"),
        perturbation=llqr.FriendlySAM(),
    )
    train(optimizer, problem, 2)
    before = everything(optimizer)
    problem.model.register_parameter("extra", nn.Parameter(torch.zeros(2, dtype=F64)))
    problem.model.register_parameter("wave", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    group = {
        "stranger": {"params": [nn.Parameter(torch.zeros(2))]},
        "twice": {"params": [problem.model[0].weight]},
        "maximize": {"params": [problem.model.extra], "maximize": True},
        "complex": {"params": [problem.model.wave]},
    }[bad]
    with pytest.raises(ValueError):
        optimizer.add_param_group(group)
    del problem.model.extra, problem.model.wave
    same(everything(optimizer), before)
    train(optimizer, problem, 2)


def test_a_group_that_the_geometry_refuses_is_taken_out_again():
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        torch.optim.SGD(problem.model[0].parameters(), lr=0.1),
        geometry=llqr.FixedGeometry(torch.eye(36, dtype=F64)),
        perturbation=llqr.FriendlySAM(),
    )
    train(optimizer, problem, 2)
    before = everything(optimizer)
    with pytest.raises(ValueError, match="57"):
        optimizer.add_param_group({"params": list(problem.model[2].parameters())})
    same(everything(optimizer), before)
    train(optimizer, problem, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_may_join_through_the_base_itself(way):
    """As through us: its blocks start at the identity, its radius counts, checkpoints hold it."""

    def build():
        problem = mlp()
        base = torch.optim.SGD(problem.model[0].parameters(), lr=0.1, momentum=0.9)
        options = {"geometry": llqr_of("kfac"), "perturbation": llqr.FriendlySAM(0.1)}
        return problem, optimizer_of(problem, base, **options)

    (problem, optimizer), (plain, twin) = build(), build()
    for o, p, add in (
        (optimizer, problem, optimizer.base.add_param_group),
        (twin, plain, twin.add_param_group),
    ):
        train(o, p, 3, way)
        add({"params": list(p.model[2].parameters()), "lr": 0.01, "rho": 0.0})
        state = o.state_dict()
        assert set(state["state"][2]) >= {"llqr.geometry.A.0", "llqr.perturbation.memory"}
        train(o, p, 3, way)
    same(everything(optimizer), everything(twin))


def test_a_bad_group_in_the_base_itself_is_named_at_the_next_use():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of())
    train(optimizer, problem, 1)
    optimizer.base.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    for use in (optimizer.state_dict, optimizer.step, lambda: optimizer.minimize(problem)):
        with pytest.raises(ValueError, match=r"base: a parameter of shape \(2,\) in group 1"):
            use()


@pytest.mark.parametrize("structure", ["dense", "scalar"])
def test_a_parameter_that_joins_a_layer_of_one_block_says_what_is_lost(structure):
    """A layer's dense matrix and its number cannot grow; what was learned is not lost silently."""
    problem = mlp()
    base = torch.optim.SGD([problem.model[0].bias], lr=0.1)
    optimizer = optimizer_of(problem, base, geometry=llqr_of(structure))
    train(optimizer, problem, 3)
    with pytest.warns(UserWarning, match="starts anew at the identity .0.bias"):
        optimizer.add_param_group({"params": [problem.model[0].weight]})
    g = {n: x for n, x in problem.gradient().items() if n.startswith("0")}
    same(optimizer.geometry.apply(g), g)


# -- gradients that come and go --------------------------------------------------------------------


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_freeze_and_unfreeze(geometry, perturbation):
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )
    train(optimizer, problem, 2)
    for p in problem.model[0].parameters():
        p.requires_grad_(False)
    start = weights(problem.model)
    for way in WAYS:
        train(optimizer, problem, 1, way)
    same(weights(problem.model)["0.weight"], start["0.weight"])
    assert gradients(problem.model)["0.weight"] is None
    assert not torch.equal(problem.model[2].weight, start["2.weight"])
    for p in problem.model[0].parameters():
        p.requires_grad_(True)
    train(optimizer, problem, 2)
    assert not torch.equal(problem.model[0].weight, start["0.weight"])


class Branches(nn.Module):
    """Which of two branches takes part is switched from outside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)
        self.use = "left"

    def forward(self, x):
        return getattr(self, self.use)(torch.tanh(self.stem(x)))


def branches():
    torch.manual_seed(0)
    model = Branches().to(F64)
    return Problem(model, torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "geometry, perturbation",
    [(g, p) for g, p in METRIC_AND_PROBE if g in ("none", "diagonal", "kfac", "dense", *SAMPLED)],
)
def test_none_gradients_appear_and_disappear(geometry, perturbation, way):
    problem = branches()
    optimizer = optimizer_of(
        problem,
        torch.optim.Adam(problem.model.parameters(), lr=0.01),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )
    for use, idle in (("left", "right"), ("right", "left"), ("left", "right")):
        problem.model.use = use
        start = weights(problem.model)
        train(optimizer, problem, 2, way)
        grads = gradients(problem.model)
        for part in ("weight", "bias"):
            same(weights(problem.model)[f"{idle}.{part}"], start[f"{idle}.{part}"])
            assert grads[f"{idle}.{part}"] is None
            assert not torch.equal(weights(problem.model)[f"{use}.{part}"], start[f"{use}.{part}"])


def test_a_gradient_that_the_second_pass_alone_has():
    """The branch changes between the passes: what the second leaves in p.grad is what counts."""
    problem = branches()
    optimizer = optimizer_of(problem, sgd(problem), perturbation=llqr.SAM(0.1))
    start = weights(problem.model)
    for i in optimizer.passes():
        problem.model.use = ("left", "right")[i]
        problem.backward()
    optimizer.step()
    end = weights(problem.model)
    same(end["left.weight"], start["left.weight"])
    assert not torch.equal(end["right.weight"], start["right.weight"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_zero_gradients_of_some_parameters(structure):
    problem = branches()

    def forward():
        z = problem.model(problem.x)
        return nn.functional.cross_entropy(z, problem.y) + 0 * problem.model.right.weight.sum(), z

    optimizer = optimizer_of(
        problem, sgd(problem), geometry=llqr_of(structure), perturbation=llqr.SAM(0.1)
    )
    start = weights(problem.model)
    for _ in range(3):
        optimizer.minimize(forward)
    same(weights(problem.model)["right.weight"], start["right.weight"])


# -- odd shapes ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A number, a class token, a strided weight, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.strided = nn.Parameter(torch.randn(3, 4).t())
        self.up = nn.ConvTranspose1d(2, 3, 2, stride=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        h = (x[:, None, :4] + self.token) @ self.strided.t().mT * self.gain
        h = self.up(h.expand(-1, 2, -1)).mean(-1)
        return self.head(h)


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_odd_shapes(geometry, perturbation):
    torch.manual_seed(0)
    problem = Problem(Odd().to(F64), torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))
    optimizer = optimizer_of(
        problem,
        sgd(problem, lr=0.05, momentum=0.5),
        geometry=GEOMETRIES[geometry](),
        perturbation=PERTURBATIONS[perturbation](),
    )
    shapes = {n: (p.shape, p.stride()) for n, p in problem.model.named_parameters()}
    losses = train(optimizer, problem, 10)
    assert losses[-1] < losses[0]
    assert shapes == {n: (p.shape, p.stride()) for n, p in problem.model.named_parameters()}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_a_parameter_without_entries(geometry, perturbation):
    problem = mlp()
    problem.model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3, dtype=F64)))

    def forward():
        z = problem.model(problem.x) + problem.model.empty.sum()
        return nn.functional.cross_entropy(z, problem.y), z

    optimizer = optimizer_of(
        problem, geometry=GEOMETRIES[geometry](), perturbation=PERTURBATIONS[perturbation]()
    )
    losses = [float(optimizer.minimize(forward)) for _ in range(5)]
    assert losses[-1] < losses[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# One refresh: eigenvectors of repeated zeros follow from rounding, and later samples meet them.
@pytest.mark.parametrize("make", [lambda: llqr_of("kfac"), lambda: natural_of(every=100)])
def test_channels_last_is_only_a_layout(make):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
        problem = Problem(
            model.to(F64).to(memory_format=layout),
            torch.randn(6, 2, 4, 4, dtype=F64).to(memory_format=layout),
            torch.randint(3, (6,)),
        )
        optimizer = optimizer_of(problem, geometry=make(), perturbation=llqr.SAM(0.1))
        train(optimizer, problem, 4)
        assert model[0].weight.is_contiguous(memory_format=layout)
        ends.append(nn.utils.parameters_to_vector(p.contiguous() for p in model.parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("geometry", ["diagonal", "kfac", "e-kfac", "dense"])
def test_tied_weights_are_one_parameter(geometry):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).to(F64)
    model[1].weight = model[0].weight
    problem = Problem(model, torch.randint(7, (12,)), torch.randint(7, (12,)))
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=llqr_of(geometry), perturbation=llqr.SAM(0.1)
    )
    losses = train(optimizer, problem, 8)
    assert losses[-1] < losses[0]
    assert model[1].weight is model[0].weight
    assert list(optimizer.geometry.parameters) == ["0.weight"]
    assert set(optimizer.geometry.spectrum()) == {"0"}
    optimizer.refresh_if_due(problem)
    for i in optimizer.passes():
        problem.backward()
        if i:
            assert torch.equal(model[1].weight, model[0].weight)
    optimizer.step()
