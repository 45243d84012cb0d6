"""Gradient accumulation is the step of the joined batch."""

import pytest
import torch
from torch import nn

import llqr
from tables import PERTURBATIONS
from tiny import STRUCTURES, close, llqr_of, mlp, optimizer_of, same, sgd, train, weights

ROWS = 12


def joined(steps=5, **options):
    problem = mlp(rows=ROWS)
    train(optimizer_of(problem, **{k: v() for k, v in options.items()}), problem, steps)
    return weights(problem.model)


def by_minimize(optimizer, parts, weights=None):
    optimizer.minimize(parts, weights=weights)


def backward(parts, weights):
    shares = weights or [1] * len(parts)
    for part, share in zip(parts, shares, strict=True):
        part.backward(share / sum(shares))


def by_passes(optimizer, parts, weights=None):
    optimizer.refresh_if_due(parts, weights=weights)
    for _ in optimizer.passes():
        backward(parts, weights)
    optimizer.step()


def by_closure(optimizer, parts, weights=None):
    def closure():
        optimizer.zero_grad()
        backward(parts, weights)
        return torch.zeros(())

    optimizer.refresh_if_due(parts, weights=weights)
    optimizer.step(closure)


def by_perturbed(optimizer, parts, weights=None):
    optimizer.refresh_if_due(parts, weights=weights)
    optimizer.zero_grad()
    backward(parts, weights)
    with optimizer.perturbed():
        backward(parts, weights)
    optimizer.step()


WAYS = {
    "minimize": by_minimize,
    "passes": by_passes,
    "closure": by_closure,
    "perturbed": by_perturbed,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("probe", [name for name in PERTURBATIONS if name != "none"])
@pytest.mark.parametrize("count", [2, 4])
def test_equal_microbatches(count, probe, way):
    options = {"perturbation": PERTURBATIONS[probe], "geometry": lambda: llqr_of("kfac")}
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, **{k: v() for k, v in options.items()})
    size = ROWS // count
    parts = [problem.part(i, i + size) for i in range(0, ROWS, size)]
    for _ in range(5):
        WAYS[way](optimizer, parts)
    close(weights(problem.model), joined(**options))


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_equal_microbatches_in_the_refresh(structure, curvature):
    options = {"geometry": lambda: llqr_of(structure, curvature=curvature, tolerance=0)}
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, **{k: v() for k, v in options.items()})
    for _ in range(5):
        optimizer.minimize([problem.part(0, 6), problem.part(6, 12)])
    close(weights(problem.model), joined(**options))


@pytest.mark.parametrize("scale", ["sum", 3.0])
def test_the_scale_of_the_curvature_counts_rows_of_all_microbatches(scale):
    options = {"geometry": lambda: llqr_of("diagonal", tolerance=0, scale=scale, lr=0.01)}
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, **{k: v() for k, v in options.items()})
    for _ in range(3):
        optimizer.minimize([problem.part(0, 6), problem.part(6, 12)])
    close(weights(problem.model), joined(3, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("scaling", [1, 0.125])
def test_weights_for_unequal_microbatches(scaling, curvature, way):
    """The curvature is that of the very loss whose gradient is used."""
    options = {
        "perturbation": PERTURBATIONS["SAM"],
        "geometry": lambda: llqr_of("kfac", curvature=curvature),
    }
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, **{k: v() for k, v in options.items()})
    parts = [problem.part(0, 2), problem.part(2, 5), problem.part(5, 12)]
    for _ in range(5):
        WAYS[way](optimizer, parts, [2 * scaling, 3 * scaling, 7 * scaling])
    close(weights(problem.model), joined(**options))


def test_equal_weights_of_unequal_microbatches_are_another_step():
    """So that the test above can fail: the plain mean is not the loss of the joined batch."""
    options = {"perturbation": PERTURBATIONS["SAM"]}
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, **{k: v() for k, v in options.items()})
    for _ in range(5):
        optimizer.minimize([problem.part(0, 2), problem.part(2, 5), problem.part(5, 12)])
    with pytest.raises(AssertionError):
        close(weights(problem.model), joined(**options), 1e-3)


def test_the_loss_is_the_joined_loss():
    problem = mlp(rows=ROWS)
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.5))
    whole = problem.loss().detach()
    parts = [problem.part(0, 4), problem.part(4, 12)]
    torch.testing.assert_close(optimizer.minimize(parts, weights=[4, 8]), whole, rtol=0, atol=1e-14)
    parts = [problem.part(0, 4), problem.part(4, 12)]
    mean = (parts[0].loss() + parts[1].loss()).detach() / 2
    torch.testing.assert_close(optimizer.minimize(parts), mean, rtol=0, atol=1e-14)


def test_a_list_of_one_is_the_forward_itself():
    one, two = mlp(), mlp()
    a, b = (optimizer_of(p, perturbation=llqr.SAM(0.1), geometry=llqr_of()) for p in (one, two))
    for _ in range(3):
        a.minimize([one], weights=[5.0])
        b.minimize(two)
    same(one.model.state_dict(), two.model.state_dict())


def test_refresh_on_its_own_list_ignores_the_weights_of_the_step():
    """`weights` belong to the micro-batches of `forward`; the refresh has forwards of its own."""
    one, two = mlp(rows=ROWS), mlp(rows=ROWS)
    a, b = (optimizer_of(p, geometry=llqr_of("kfac", every=9)) for p in (one, two))
    thirds = [[p.part(0, 4), p.part(4, 8), p.part(8, 12)] for p in (one, two)]
    a.minimize([one.part(0, 4), one.part(4, 12)], weights=[1, 2], refresh=thirds[0])
    b.refresh(thirds[1])
    b.minimize([two.part(0, 4), two.part(4, 12)], weights=[1, 2])
    same(a.geometry.state(), b.geometry.state())
    same(one.model.state_dict(), two.model.state_dict())


def test_refresh_if_due_takes_weights():
    one, two = mlp(rows=ROWS), mlp(rows=ROWS)
    a, b = (optimizer_of(p, geometry=llqr_of("kfac", tolerance=0)) for p in (one, two))
    a.refresh_if_due([one.part(0, 4), one.part(4, 12)], weights=[1, 2])
    b.refresh_if_due(two)
    for name, entry in a.geometry.state().items():
        close(entry, b.geometry.state()[name])


def test_one_clip_for_all_microbatches():
    problem = mlp()
    optimizer = optimizer_of(problem, sgd(problem), perturbation=llqr.SAM(0.1))
    norms = []
    optimizer.minimize(
        [problem.part(0, 6), problem.part(6, 12)],
        before_step=lambda: norms.append(
            float(nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-4))
        ),
    )
    assert len(norms) == 1
    total = torch.cat([p.grad.flatten() for p in problem.model.parameters()]).norm()
    assert total <= 1.0001e-4
