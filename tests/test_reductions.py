"""Where the method reduces to a simpler one, it does so bit for bit."""

import dataclasses

import pytest
import torch
from torch import nn

import llqr
from tables import BASES, LEFT_OUT, MATRICES_ONLY, PERTURBATIONS
from tiny import (
    STRUCTURES,
    WAYS,
    dropout_mlp,
    identity_matrix,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    same,
    sgd,
    train,
    train_plainly,
    weights,
)

PROBES = [name for name in PERTURBATIONS if name != "none"]


def base_of(name, problem):
    if name in LEFT_OUT:
        pytest.skip(LEFT_OUT[name])
    parameters = list(problem.model.parameters())
    if name in MATRICES_ONLY:
        parameters = [p for p in parameters if p.dim() == 2]
    return BASES[name](parameters)


def both(make=mlp, ours=None, theirs=None, steps=5, way="minimize"):
    """Train twice from one start: with the options ``ours``, and with ``theirs`` (None: plainly).

    The options map a problem to the arguments of llqr.Optimizer.
    """
    ends = []
    for options in (ours, theirs):
        problem = make()
        torch.manual_seed(1)
        if options is None:
            losses = train_plainly(sgd(problem, momentum=0.9), problem, steps)
        else:
            losses = train(optimizer_of(problem, **options(problem)), problem, steps, way)
        ends.append((losses, problem.model.state_dict(), torch.rand(3)))
    same(*ends)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", BASES)
def test_without_geometry_and_perturbation_it_is_the_base(base, way):
    ends = []
    for wrapped in (True, False):
        problem = norm_net(dropout=0.5)
        optimizer = base_of(base, problem)
        torch.manual_seed(1)
        if wrapped:
            losses = train(llqr.Optimizer(optimizer, problem.model), problem, 4, way)
        else:
            losses = train_plainly(optimizer, problem, 4)
        ends.append((losses, problem.model.state_dict(), optimizer.state_dict(), torch.rand(3)))
    same(*ends)


@pytest.mark.parametrize("geometry", [None, "kfac"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROBES)
def test_rho_zero_is_the_unperturbed_method(name, way, geometry):
    def ours(problem):
        probe = PERTURBATIONS[name]()
        probe.rho = 0.0
        return {"perturbation": probe, "geometry": geometry and llqr_of(geometry)}

    both(
        lambda: norm_net(dropout=0.5),
        ours,
        lambda problem: {"geometry": geometry and llqr_of(geometry)},
        way=way,
    )


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("rho", [0, 0.0, lambda step: 0.0], ids=["0", "0.0", "schedule"])
def test_rho_zero_costs_one_pass(name, rho):
    problem = mlp()
    probe = PERTURBATIONS[name]()
    probe.rho = rho
    optimizer = optimizer_of(problem, perturbation=probe)
    assert not optimizer.needs_second_pass
    for way in WAYS:
        problem.calls = 0
        train(optimizer, problem, 2, way)
        assert problem.calls == 2, way


@pytest.mark.parametrize("way", WAYS)
def test_a_perturbation_costs_two_passes(way):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    assert optimizer.needs_second_pass
    train(optimizer, problem, 3, way)
    assert problem.calls == 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graft", [False, True])
@pytest.mark.parametrize("perturbation", [None, "SAM", "FriendlySAM"])
def test_identity_geometry_is_no_geometry(perturbation, graft, way):
    probe = PERTURBATIONS[perturbation or "none"]
    both(
        norm_net,
        lambda problem: {
            "geometry": llqr_of("identity"),
            "perturbation": probe(),
            "graft": graft,
        },
        lambda problem: {"perturbation": probe()},
        way=way,
    )


@pytest.mark.parametrize("perturbation", ["none", "SAM", "FriendlySAM"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_before_its_first_refresh_a_geometry_is_no_geometry(structure, perturbation):
    def ours(problem):
        geometry = llqr_of(structure, start=5)
        return {"geometry": geometry, "perturbation": PERTURBATIONS[perturbation]()}

    both(norm_net, ours, lambda problem: {"perturbation": PERTURBATIONS[perturbation]()})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_transport_and_perturbation_it_is_the_base(structure):
    both(
        lambda: norm_net(dropout=0.5),
        lambda problem: {"geometry": llqr_of(structure), "transport": False, "graft": True},
    )


def test_transport_false_keeps_the_geometry_in_the_probe():
    """LLQR-delta + SAM: theta <- theta - lr g~ with the probe along U g."""
    problem = mlp()
    geometry = llqr_of("kfac")
    optimizer = optimizer_of(
        problem, sgd(problem), geometry=geometry, perturbation=llqr.SAM(0.1), transport=False
    )
    train(optimizer, problem, 3)
    start, g = weights(problem.model), problem.gradient()
    d = geometry.apply(g)
    norm = (sum((g[n] * d[n]).sum() for n in g) + 1e-12).sqrt()
    with torch.no_grad():
        for n, p in problem.model.named_parameters():
            p.add_(0.1 * d[n] / norm)
    second = problem.gradient()
    with torch.no_grad():
        for n, p in problem.model.named_parameters():
            p.copy_(start[n])
    geometry = optimizer.geometry
    geometry.settings = dataclasses.replace(geometry.settings, every=1000)
    train(optimizer, problem, 1)
    for n, p in problem.model.named_parameters():
        torch.testing.assert_close(p.detach(), start[n] - 0.1 * second[n], rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROBES)
def test_identity_matrix_is_no_geometry(name, way):
    both(
        mlp,
        lambda problem: {
            "geometry": identity_matrix(problem),
            "perturbation": PERTURBATIONS[name](),
        },
        lambda problem: {"perturbation": PERTURBATIONS[name]()},
        way=way,
    )


@pytest.mark.parametrize("way", WAYS)
def test_start_switches_the_probe_on(way):
    problem, plain = mlp(), mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1, start=3))
    base = sgd(plain, momentum=0.9)
    for step in range(3):
        assert not optimizer.needs_second_pass, step
        same(train(optimizer, problem, 1, way), train_plainly(base, plain, 1))
    assert problem.calls == 3
    same(problem.model.state_dict(), plain.model.state_dict())
    assert optimizer.needs_second_pass
    train(optimizer, problem, 1, way)
    train_plainly(base, plain, 1)
    assert problem.calls == 5
    assert not torch.equal(problem.model[0].weight, plain.model[0].weight)


def test_a_schedule_is_read_at_the_optimizer_step():
    def ours(problem):
        return {"perturbation": llqr.SAM(lambda step: 0.1 if step % 2 else 0.0)}

    problem = mlp()
    optimizer = optimizer_of(problem, **ours(problem))
    calls = []
    for _ in range(4):
        before = problem.calls
        train(optimizer, problem, 1)
        calls.append(problem.calls - before)
    assert calls == [1, 2, 1, 2]


def test_a_constant_schedule_is_the_constant():
    both(
        mlp,
        lambda problem: {"perturbation": llqr.SAM(lambda step: 0.1)},
        lambda problem: {"perturbation": llqr.SAM(0.1)},
    )


def test_the_option_of_a_group_goes_before_the_default():
    def run(default, option):
        problem = mlp()
        group = {"params": list(problem.model.parameters()), "rho": option}
        base = torch.optim.SGD([group], lr=0.1, momentum=0.9)
        optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(default))
        return train(optimizer, problem, 4), problem.model.state_dict()

    same(run(0.3, 0.1), run(0.1, 0.1))
    same(run(0.3, lambda step: 0.1), run(0.1, 0.1))
    same(run(0.3, 0.0), run(0.0, 0.0))


def test_rho_zero_in_all_groups_costs_one_pass():
    problem = mlp()
    groups = [{"params": [p], "rho": 0.0} for p in problem.model.parameters()]
    optimizer = optimizer_of(problem, torch.optim.SGD(groups, lr=0.1), perturbation=llqr.SAM(0.1))
    train(optimizer, problem, 2)
    assert problem.calls == 2


def test_only_the_norm_layer_is_perturbed():
    """SAM-ON: the other groups' rho is 0."""
    problem = norm_net()
    norm = list(problem.model[1].parameters())
    others = [p for p in problem.model.parameters() if all(p is not q for q in norm)]
    base = torch.optim.SGD([{"params": others, "rho": 0.0}, {"params": norm}], lr=0.1)
    optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(0.1))
    start = weights(problem.model)
    for i in optimizer.passes():
        problem.backward()
        if i == 1:
            moved = {n for n, p in problem.model.named_parameters() if not torch.equal(p, start[n])}
            assert moved == {"1.weight", "1.bias"}
    optimizer.step()


def test_start_of_the_geometry():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of("diagonal", start=2, every=3))
    steps = []
    optimizer.register_refresh_hook(lambda _, report: steps.append(report.step))
    train(optimizer, problem, 9)
    assert steps == [2, 5, 8]


def test_every_may_follow_a_schedule():
    problem = mlp()
    geometry = llqr_of("diagonal", every=lambda step: 1 if step < 3 else 4)
    optimizer = optimizer_of(problem, geometry=geometry)
    steps = []
    optimizer.register_refresh_hook(lambda _, report: steps.append(report.step))
    train(optimizer, problem, 11)
    assert steps == [0, 1, 2, 6, 10]


def test_graft_by_layer_keeps_the_length_of_each_gradient():
    problem = mlp()
    optimizer = optimizer_of(
        problem, sgd(problem, lr=1.0), geometry=llqr_of("kfac", steps=20), graft="layer"
    )
    start, g = weights(problem.model), problem.gradient()
    train(optimizer, problem, 1)
    ug = optimizer.geometry.apply(g)
    for n, p in problem.model.named_parameters():
        expected = ug[n] * (g[n].norm() / ug[n].norm())
        torch.testing.assert_close(start[n] - p.detach(), expected, rtol=1e-10, atol=1e-14)
        assert abs(ug[n].norm() / g[n].norm() - 1) > 1e-4  # or there was nothing to do


def test_graft_keeps_the_length_of_the_gradient():
    problem = mlp()
    optimizer = optimizer_of(
        problem, sgd(problem, lr=1.0), geometry=llqr_of("kfac", steps=20), graft=True
    )
    start, g = weights(problem.model), problem.gradient()
    train(optimizer, problem, 1)
    moved = {n: start[n] - p.detach() for n, p in problem.model.named_parameters()}
    ug = optimizer.geometry.apply(g)
    length, target, raw = (
        torch.cat([v.flatten() for v in d.values()]).norm() for d in (moved, g, ug)
    )
    assert abs(length / target - 1) < 1e-12
    assert abs(raw / target - 1) > 1e-3  # or grafting would have had nothing to do
    for n in moved:
        torch.testing.assert_close(moved[n], ug[n] * (target / raw), rtol=1e-10, atol=1e-14)


def test_every_base_of_torch_is_in_the_table():
    public = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)}
    # The oldest torch lacks some of the table.
    assert public - {"Optimizer"} <= {name.split("-")[0] for name in BASES}


def test_a_base_may_hold_a_part_of_the_model():
    problem, plain = mlp(), mlp()
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model[2].parameters(), lr=0.1),
        problem.model,
        geometry=llqr_of("identity"),
    )
    train(optimizer, problem, 3)
    train_plainly(torch.optim.SGD(plain.model[2].parameters(), lr=0.1), plain, 3)
    same(problem.model.state_dict(), plain.model.state_dict())


def test_dropout_draws_the_same_masks_at_rho_zero():
    both(
        dropout_mlp,
        lambda problem: {"perturbation": llqr.SAM(0.0)},
        lambda problem: {},
    )


def test_tied_weights_move_once():
    def tied():
        problem = mlp()
        problem.model.append(nn.Tanh())
        problem.model.append(nn.Linear(3, 6, dtype=torch.float64))
        problem.model.append(nn.Linear(6, 3, dtype=torch.float64))
        problem.model[5].weight = problem.model[2].weight
        return problem

    both(tied, lambda problem: {"geometry": identity_matrix(problem)})
    both(
        tied,
        lambda problem: {"geometry": llqr_of("kfac", start=5), "perturbation": llqr.SAM(0.1)},
        lambda problem: {"perturbation": llqr.SAM(0.1)},
    )
