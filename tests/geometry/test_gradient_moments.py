"""GradientMoments: averages of the gradients' second moments, and U from them."""

from __future__ import annotations

import copy

import pytest
import torch

import llqr
from llqr.geometry.structures.closed_form import OneSided
from tiny import F64, mlp, sgd

DAMPING, BETA = 0.1, 0.8


def moments_of(structure="kfac", **settings):
    usual = {"renew_every": 3, "ema": BETA, "damping": DAMPING}
    return llqr.GradientMoments(structure, **{**usual, **settings})


def trained(geometry, steps, **options):
    problem = mlp(F64)
    optimizer = llqr.Optimizer(
        sgd(problem, momentum=0.9), problem.model, geometry=geometry, **options
    )
    seen, learned = [], []
    for _ in range(steps):
        optimizer.minimize(problem)
        seen.append({n: p.grad.clone() for n, p in problem.model.named_parameters()})
        learned.append(copy.deepcopy(optimizer.geometry.state()))
    optimizer.learned = learned
    return problem, optimizer, seen


def averages(gradients, square):
    """sum of beta^i x_(k-i) over sum of beta^i."""
    weights = [BETA**i for i in reversed(range(len(gradients)))]
    return sum(w * square(g) for w, g in zip(weights, gradients)) / sum(weights)  # noqa: B905


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal"])
def test_u_is_the_root_of_the_averaged_moments(structure):
    """After four steps U is of the fourth gradient, as it turns at the first and fourth."""
    _, optimizer, seen = trained(moments_of(structure), 4)
    geometry = optimizer.geometry
    state, values = geometry.state(), {}
    for name in seen[0]:
        gradients = [g[name] for g in seen]
        entries = state[name]
        if structure != "diagonal" and gradients[0].dim() == 2:
            left, right = (
                averages(gradients, lambda g: g @ g.T),
                averages(gradients, lambda g: g.T @ g),
            )
            q, p = entries["QB.0"], entries["QA.0"]
            torch.testing.assert_close(entries["L.0"], left)
            torch.testing.assert_close(entries["R.0"], right)
            torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype))
            if structure == "kfac":
                rows, columns = ((b.T @ m @ b).diagonal() for b, m in ((q, left), (p, right)))
                values[name] = rows[:, None] * columns / columns.sum()
            else:  # measured in the bases of the time
                turned = [
                    known[name]["QB.0"].T @ g @ known[name]["QA.0"]
                    for known, g in zip(optimizer.learned, gradients, strict=True)
                ]
                values[name] = averages(turned, torch.square)
        else:
            values[name] = averages(gradients, torch.square)
    count = sum(v.numel() for v in values.values())
    damping = DAMPING * sum(v.sum() for v in values.values()) / count
    roots = {name: (v + damping).rsqrt() for name, v in values.items()}
    c = count / sum(r.sum() for r in roots.values())
    x = {name: torch.randn_like(v) for name, v in values.items()}
    found = geometry.apply(x)
    for name, r in roots.items():
        entries = state[name]
        if "QB.0" in entries:
            q, p = entries["QB.0"], entries["QA.0"]
            expected = q @ (c * r * (q.T @ x[name] @ p)) @ p.T
        else:
            expected = c * r * x[name]
        torch.testing.assert_close(found[name], expected)


def test_bases_are_exact_first_and_follow_later():
    _, optimizer, seen = trained(moments_of(), 1)
    name = "0.weight"
    q = optimizer.geometry.state()[name]["QB.0"]
    g = seen[0][name]
    turned = q.T @ (g @ g.T) @ q
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-12 * turned.abs().max()
    # Where gradients are always alike, the iteration stays there.
    geometry = optimizer.geometry
    gradients = dict(seen[0])
    for _ in range(6):
        geometry.observe(gradients)
    now = geometry.state()[name]["QB.0"]
    strong = turned.diagonal() > 1e-3 * turned.diagonal().max()
    overlap = (q.T @ now).square().amax(1)[strong]
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-6)


def test_it_needs_no_forward_and_refreshes_never():
    problem, optimizer, _ = trained(moments_of(), 5)
    assert not optimizer.refresh_due and optimizer.geometry.refreshes_in(1000) == 0
    assert optimizer.geometry.counters() == {
        "refreshes": 0, "refused": 0, "failures": 0, "saturated": 0, "last": -1, "observed": 5,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="nothing to refresh"):
        optimizer.refresh(problem)


def test_parameters_without_a_gradient_keep_their_u():
    problem = mlp(F64)
    optimizer = llqr.Optimizer(sgd(problem), problem.model, geometry=moments_of(renew_every=1))
    last = problem.model[-1].weight
    optimizer.minimize(problem)
    before = copy.deepcopy(optimizer.geometry.state())
    last.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.minimize(problem)
    after = optimizer.geometry.state()
    (name,) = [n for n, p in problem.model.named_parameters() if p is last]
    for n, entries in before.items():
        same = all(torch.equal(v, after[n][k]) for k, v in entries.items())
        assert same == (n == name), n


@pytest.mark.parametrize(
    "structure",
    ["kfac", "e-kfac", "diag-kfac", "dense", "diagonal", "scalar", OneSided, "identity"],
)
def test_averages_of_what_joins_late_begin_with_its_first_gradient(structure):
    """Where gradients never change, averages are the same whenever a parameter joined."""
    geometries = []
    for joins in (0, 4):
        problem = mlp(F64)
        head = list(problem.model[-1].parameters())
        rest = [p for p in problem.model.parameters() if all(p is not q for q in head)]
        base = torch.optim.SGD(rest if joins else [*rest, *head], lr=0.0)
        optimizer = llqr.Optimizer(base, problem.model, geometry=moments_of(structure))
        for step in range(7):
            if joins and step == joins:
                optimizer.add_param_group({"params": head})
            optimizer.zero_grad()
            optimizer.minimize(problem)
        geometries.append(optimizer.geometry)
    if structure not in ("kfac", "e-kfac", OneSided):  # whose bases follow from the identity
        gradients = {n: p.grad for n, p in problem.model.named_parameters()}
        found, expected = (geometry.apply(gradients) for geometry in geometries)
        torch.testing.assert_close(found, expected)
    found, expected = (geometry.state() for geometry in geometries)
    for name, entries in expected.items():
        for key, value in entries.items():
            if key[0] in "LRBA" or key == "M":  # not what is measured in bases
                close = {"rtol": 1e-12, "atol": 0, "msg": f"{name} {key}"}
                torch.testing.assert_close(found[name][key], value, **close)


@pytest.mark.parametrize("way", ["copy", "state"])
@pytest.mark.parametrize("transport", [True, "bases"])
def test_training_goes_on_bitwise(way, transport):
    problem, optimizer, _ = trained(moments_of(), 5, transport=transport)
    if way == "copy":
        other, resumed = copy.deepcopy((problem, optimizer))
    else:
        other = copy.deepcopy(problem)
        resumed = llqr.Optimizer(
            sgd(other, momentum=0.9), other.model, geometry=moments_of(), transport=transport
        )
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.minimize(problem)
        resumed.minimize(other)
    for a, b in zip(problem.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_reset_starts_anew():
    problem, optimizer, _ = trained(moments_of(), 5)
    optimizer.geometry.reset()
    assert optimizer.geometry.observed == 0
    g = {n: torch.randn_like(p) for n, p in problem.model.named_parameters()}
    for name, moved in optimizer.geometry.apply(g).items():
        assert torch.equal(moved, g[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renew_every": 0}, "renew_every"),
        ({"ema": 1.0}, "ema"),
        ({"damping": 0.0}, "damping"),
        ({"power": 3.0}, "power"),
        ({"structure": "identity-kfac"}, "identity-kfac"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        llqr.GradientMoments(**settings)


def test_the_repr_is_the_call():
    assert repr(llqr.GradientMoments()) == "GradientMoments('kfac')"
    shown = repr(llqr.GradientMoments("e-kfac", renew_every=5))
    assert shown == "GradientMoments('e-kfac', renew_every=5)"
