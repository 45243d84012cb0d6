"""One refresh: where it starts, what it averages, what it keeps, refuses and reports."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import agree, explicit_U, vector
from nets import LEARNED, bound, copied, entries, trio, zoo
from tiny import STRUCTURES, mlp, optimizer_of, same, says, sgd, through_file, train


def kl(z: Tensor, at: Tensor) -> Tensor:
    old = at.log_softmax(1)
    return (old.exp() * (old - z.log_softmax(1))).sum(1).mean()


# -- warm start and average ------------------------------------------------------------------------


@pytest.mark.parametrize("structure", LEARNED)
def test_a_refresh_starts_from_the_current_u(structure):
    problem = mlp()
    geometry = bound(problem, structure, ema=0.5, lr=1e-3)
    first, second = (geometry.refresh([problem]) for _ in range(2))
    assert second.J_before == pytest.approx(first.J_after, rel=1e-12)
    assert second.J_after < first.J_after < first.J_before


@pytest.mark.parametrize("structure", LEARNED)
def test_ema_averages_the_factors(structure):
    """U <- beta U + (1 - beta) U_T, entry by entry; for products that is not the operators' EMA."""
    problem = trio()
    settings = {"constraint": "none", "lr": 0.01, "block_size": None}
    averaged = bound(problem, structure, ema=0.7, **settings)
    averaged.refresh([problem])
    for _ in range(2):
        old = copied(averaged)
        replaced = bound(problem, structure, ema=0.0, **settings)
        replaced.load_state(old)
        replaced.refresh([problem])
        averaged.refresh([problem])
        for name, own in averaged.state().items():
            for key, value in own.items():
                expected = 0.7 * old[name][key] + 0.3 * replaced.state()[name][key]
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    U, before, solved = (
        explicit_U(problem.model, structure, s) for s in (averaged.state(), old, replaced.state())
    )
    gap = float((U - 0.7 * before - 0.3 * solved).norm()) / float((solved - before).norm())
    assert (gap < 1e-10) is (structure in ("scalar", "diagonal", "dense"))


# -- what is refused -------------------------------------------------------------------------------


def wild(structure: str = "kfac", **settings) -> tuple:
    """A geometry whose inner solve overshoots, and a batch that it then does not like."""
    problem = mlp()
    return problem, bound(problem, structure, **{"lr": 50.0, "ema": 0.0, "scale": 50, **settings})


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "e-kfac", "dense"])
def test_a_refresh_that_raises_j_is_refused(structure):
    problem, geometry = wild(structure)
    before = copied(geometry)
    with pytest.warns(UserWarning, match="refused because J did not go down") as found:
        report = geometry.refresh([problem], step=4)
    assert len(found) == 1
    assert not report.accepted and report.reason == "J did not go down"
    assert report.J_after > report.J_before
    assert report.ratio == 1.0 and report.change == 0.0  # of the U that was kept
    assert report.eigenvalue_min == report.eigenvalue_max == 1.0
    same(copied(geometry), before)
    assert geometry.counters() == {
        "refreshes": 1,
        "refused": 1,
        "failures": 1,
        "saturated": 0,
        "last": 4,
    }
    assert not geometry.due(5)
    geometry.refresh([problem], step=5)  # later ones are counted, without a warning
    assert geometry.counters() == {
        "refreshes": 2,
        "refused": 2,
        "failures": 2,
        "saturated": 0,
        "last": 5,
    }


def test_without_the_constraint_nothing_is_refused_for_j():
    problem, geometry = wild(constraint="none")
    with pytest.warns(UserWarning, match="negative eigenvalue"):
        report = geometry.refresh([problem])
    assert report.accepted and report.J_after > report.J_before


@pytest.mark.parametrize(
    "constraint, steps, reason",
    [
        ("positive", 3, "the inner solve left entries that are not finite"),
        ("none", 3, "the inner solve left entries that are not finite"),
        ("none", 1, "J is not finite"),  # within bounds J is finite
    ],
)
def test_blocks_and_j_that_are_not_finite(constraint, steps, reason):
    problem, geometry = wild("diagonal", constraint=constraint, lr=1e160, steps=steps, clip=None)
    before = copied(geometry)
    with pytest.warns(UserWarning, match="refused") as found:
        report = geometry.refresh([problem])
    assert len(found) == 1 and report.reason == reason
    assert not report.accepted and not math.isfinite(report.J_after)
    same(copied(geometry), before)


def test_too_many_refusals_in_a_row_raise():
    problem, geometry = wild(max_failures=2)
    before = copied(geometry)
    with pytest.warns(UserWarning, match="refused"):
        geometry.refresh([problem], step=0)
    geometry.refresh([problem], step=1)
    with says(llqr.RefreshError, "3 refreshes in a row", "J did not go down", "50.0",
              "max_failures", "U is unchanged"):  # fmt: skip
        geometry.refresh([problem], step=2)
    same(copied(geometry), before)
    assert geometry.counters() == {
        "refreshes": 3,
        "refused": 3,
        "failures": 3,
        "saturated": 0,
        "last": 2,
    }
    with pytest.raises(llqr.RefreshError, match="4 refreshes"):
        geometry.refresh([problem], step=3)


def test_none_tolerated():
    problem, geometry = wild(max_failures=0)
    with pytest.raises(llqr.RefreshError, match="1 refreshes"):
        geometry.refresh([problem])


def test_recovery():
    """One that is accepted starts the count anew; the number in all stays."""
    problem, geometry = wild(lr=lambda step: 1e-3 if step == 2 else 50.0, max_failures=2)
    with pytest.warns(UserWarning, match="refused"):
        geometry.refresh([problem], step=0)
    geometry.refresh([problem], step=1)
    assert geometry.refresh([problem], step=2).accepted
    assert geometry.counters() == {
        "refreshes": 3,
        "refused": 2,
        "failures": 0,
        "saturated": 0,
        "last": 2,
    }
    learned = copied(geometry)
    for step in (3, 4):
        geometry.refresh([problem], step=step)
    same(copied(geometry), learned)
    with pytest.raises(llqr.RefreshError):
        geometry.refresh([problem], step=5)


def test_a_zero_gradient_leaves_u_as_it_is():
    """Nothing to learn and nothing wrong: J is 0 before and after."""
    problem = mlp()
    with torch.no_grad():
        target = problem.model(problem.x)

    def forward() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return nn.functional.mse_loss(z, target), z

    for structure in STRUCTURES:
        geometry = bound(problem, structure)
        report = geometry.refresh([forward])
        assert report.accepted and report.J_before == report.J_after == 0.0
        assert report.gradient_norm == 0.0 and math.isnan(report.ratio)
        assert "nan" not in str(report) and "gradient of its batch is zero" in str(report)
        assert all(pair == pytest.approx((1.0, 1.0)) for pair in geometry.spectrum().values())


@pytest.mark.parametrize("structure", LEARNED)
def test_nothing_left_to_gain_is_no_refusal(structure):
    """U at its bound, the same batch again and again: J stays where it is, up to rounding."""
    problem = mlp(torch.float32)
    geometry = bound(problem, structure, ema=0.0, lr=0.003, bounds=(0.95, 1.05), max_failures=0)
    reports = [geometry.refresh([problem]) for _ in range(8)]
    for report in reports:
        assert report.accepted
        assert report.J_after <= report.J_before + 1e-5 * abs(report.J_before)


def test_the_identity_has_nothing_to_learn():
    problem = mlp()
    geometry = bound(problem, "identity")
    report = geometry.refresh([problem])
    assert report.accepted and report.J_after == report.J_before and report.change == 0.0
    assert geometry.numel() == 0 and geometry.spectrum() == {"0": (1.0, 1.0), "2": (1.0, 1.0)}
    assert geometry.state() == {n: {} for n in geometry.parameters}


# -- constraints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", LEARNED)
@pytest.mark.parametrize("bases", ["learned", "gradient"])
def test_bounds_hold_after_every_refresh(structure, bases):
    """Also where the solve wants to leave them, and for the average. By dense eigenvalues."""
    problem = trio()
    geometry = bound(
        problem, structure, bases=bases, bounds=(0.9, 1.1), ema=0.3, lr=0.02, scale=4.0,
        renew_every=2, max_failures=9,
    )  # fmt: skip
    extremes = []
    for _ in range(5):
        assert geometry.refresh([problem]).accepted
        values = torch.linalg.eigvalsh(explicit_U(problem.model, structure, geometry.state()))
        extremes.append((float(values[0]), float(values[-1])))
    assert all(low >= 0.9 - 1e-12 and high <= 1.1 + 1e-12 for low, high in extremes)
    assert min(low for low, _ in extremes) < 0.91  # the bound was met
    lows, highs = zip(*geometry.spectrum().values(), strict=True)
    assert (min(lows), max(highs)) == pytest.approx(extremes[-1], rel=1e-9)


@pytest.mark.parametrize("structure", ["diagonal", "scalar", "kfac", "dense"])
def test_constraint_none_is_unconstrained_and_says_so(structure):
    problem = mlp()
    geometry = bound(problem, structure, constraint="none", lr=0.5, ema=0.0, scale=99.0)
    if structure in ("diagonal", "scalar"):  # U <- max(U, 1e-8) there, as the authors' code does
        geometry = bound(problem, structure, constraint="none", lr=50.0, ema=0.0, scale=99, steps=1)
        geometry.refresh([problem])
        assert float(entries(geometry).min()) == 1e-8
        return
    with pytest.warns(UserWarning, match="negative eigenvalue") as found:
        for _ in range(2):
            geometry.refresh([problem])
    assert len(found) == 1  # once
    U = explicit_U(problem.model, structure, geometry.state())
    assert float(torch.linalg.eigvalsh(0.5 * (U + U.T))[0]) < 0


def test_probes_in_an_indefinite_metric_are_skipped_and_counted():
    problem = mlp()
    geometry = llqr.LLQR("dense", constraint="none", every=1000)
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=llqr.SAM(0.1))
    train(optimizer, problem, 1)
    state = copied(geometry)
    for own in state.values():
        for value in own.values():
            value.neg_()
    geometry.load_state(state)
    train(optimizer, problem, 2)
    assert optimizer.skipped_probes == 2


def test_squared_eigenvalues():
    """S is raw^2 + 1e-12, so matrices stay positive; vectors are unconstrained, as theirs are."""
    problem = trio()
    geometry = bound(problem, "e-kfac", constraint="square", lr=0.05, ema=0.0, scale=6.0)
    with pytest.warns(UserWarning, match=r"negative eigenvalue \(constraint='square';"):
        for _ in range(3):
            geometry.refresh([problem])
    raw = geometry.state()["up.weight"]["S.0"]
    assert float(raw.min()) != float(raw.abs().min()) or float(raw.min()) < 1
    U = explicit_U(problem.model, "e-kfac", geometry.state(), square=True)
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    agree(vector(geometry.apply(g).values()), U @ vector(g.values()), 1e-12)
    matrices = [i for i, (n, p) in enumerate(geometry.parameters.items()) if p.dim() > 1]
    sizes = [p.numel() for p in geometry.parameters.values()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for i in matrices:
        own = slice(starts[i], starts[i] + sizes[i])
        assert float(torch.linalg.eigvalsh(U[own, own])[0]) > 0


def test_squared_eigenvalues_are_refused_too_when_J_does_not_go_down():
    """Only constraint="none" takes what the solve came to, as the authors' code does."""
    problem, geometry = wild("e-kfac", constraint="square", lr=0.5)
    before = copied(geometry)
    with pytest.warns(UserWarning, match="refused"):
        report = geometry.refresh([problem])
    assert not report.accepted and report.reason is not None
    assert not report.J_after <= report.J_before
    same(geometry.state(), before)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "scalar", "dense", "diag-kfac"])
def test_square_is_only_for_e_kfac(structure):
    with says(ValueError, "constraint", "'square'", "only for 'e-kfac'", structure):
        bound(mlp(), structure, constraint="square")


@pytest.mark.parametrize("curvature", ["fisher", llqr.Divergence(kl)])
def test_a_saturated_network_refuses_the_refresh_in_the_middle_of_training(curvature):
    """Its softmax is one-hot in floating point, so H is zero though the gradient is not.

    Nothing that a setting could help with: it may happen any number of times.
    """
    problem = mlp()
    optimizer = optimizer_of(
        problem,
        sgd(problem, lr=0.0),
        geometry=llqr.LLQR("kfac", curvature=curvature, every=1, max_failures=0),
        perturbation=llqr.SAM(0.1),
    )
    train(optimizer, problem, 2)
    U = copied(optimizer.geometry)
    with torch.no_grad():
        problem.model[2].weight.mul_(1e6)
    with pytest.warns(UserWarning, match="refused because the loss has no curvature") as found:
        train(optimizer, problem, 3)
    assert len(found) == 1
    report = optimizer.last_report
    assert not report.accepted and report.step == 4 and "certain" in report.reason
    assert optimizer.geometry.counters() == {
        "refreshes": 4,
        "refused": 2,
        "failures": 0,
        "saturated": 2,
        "last": 4,
    }
    same(optimizer.geometry.state(), U)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    with torch.no_grad():
        problem.model[2].weight.mul_(1e-6)
    assert optimizer.refresh(problem).accepted


def test_without_curvature_from_the_first_refresh_on_it_is_an_error():
    """Then the likely reason is a loss that is linear in the outputs handed over."""
    problem = mlp()
    geometry = bound(problem)

    def linear():
        z = problem.model(problem.x).log_softmax(1)
        return nn.functional.nll_loss(z, problem.y), z

    with says(ValueError, "loss is linear in `outputs`"):
        geometry.refresh([linear])
    geometry.refresh([problem])
    with pytest.warns(UserWarning, match="has become linear"):
        assert not geometry.refresh([linear]).accepted


# -- the report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", LEARNED)
def test_report(structure, caplog):
    problem = zoo()
    geometry = bound(problem, structure, lr=0.003, ema=0.5, damping=0.1)
    with caplog.at_level(logging.INFO, "llqr"):
        report = geometry.refresh([problem], step=11)
    g, C = problem.matrices["g"], problem.matrices["fisher"]
    U = explicit_U(problem.model, structure, geometry.state())

    def J(u: Tensor) -> float:
        return float(g @ u + 0.5 * u @ C @ u + 0.05 * u @ u)

    assert report.step == 11 and report.accepted and report.reason is None
    assert report.J_before == pytest.approx(J(-g), rel=1e-10)
    assert report.J_after == pytest.approx(J(-U @ g), rel=1e-10)
    assert report.gradient_norm == pytest.approx(float(g.norm()), rel=1e-12)
    ug = U @ g
    assert report.ratio == pytest.approx(float(ug.norm() / g.norm()), rel=1e-10)
    assert report.change == pytest.approx(float((ug - g).norm() / g.norm()), rel=1e-8)
    assert report.cosine == pytest.approx(float(ug @ g / ug.norm() / g.norm()), rel=1e-10)
    values = torch.linalg.eigvalsh(0.5 * (U + U.T))
    assert report.eigenvalue_min == pytest.approx(float(values[0]), rel=1e-6)
    assert report.eigenvalue_max == pytest.approx(float(values[-1]), rel=1e-6)
    assert 2 <= report.products <= 52 and report.seconds > 0
    text = str(report)
    assert caplog.messages == [text]
    assert text.startswith("refresh at step 11 accepted: J ") and "|Ug-g|/|g|" in text
    with pytest.raises(AttributeError):
        report.accepted = False
