"""LLQR as a whole: when it refreshes, what it averages, what it keeps and what it refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import F64, agree, explicit_U, vector
from nets import Zoo, trio, zoo
from tiny import STRUCTURES, mlp, norm_net, optimizer_of, same, says, train

LEARNED = [s for s in STRUCTURES if s != "identity"]


def bound(problem, structure="diagonal", **settings) -> llqr.LLQR:
    """A geometry on a problem in evaluation mode, ready to refresh."""
    geometry = llqr.LLQR(structure, **settings)
    problem.model.eval()
    geometry.bind(problem.model)
    return geometry


def copied(geometry: llqr.LLQR) -> dict[str, dict[str, Tensor]]:
    return {n: {k: v.clone() for k, v in e.items()} for n, e in geometry.state().items()}


def entries(geometry: llqr.LLQR) -> Tensor:
    return vector(v for e in geometry.state().values() for v in e.values())


# -- when ------------------------------------------------------------------------------------------


def refreshes(steps: int, **settings) -> list[int]:
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr.LLQR("diagonal", steps=1, **settings))
    at = []
    optimizer.register_refresh_hook(lambda optimizer, report: at.append(report.step))
    train(optimizer, problem, steps)
    return at


def test_refresh_schedule():
    assert refreshes(7, every=3) == [0, 3, 6]
    assert refreshes(7, every=3, start=2) == [2, 5]
    assert refreshes(4, every=100) == [0]
    assert refreshes(4, every=1) == [0, 1, 2, 3]
    assert refreshes(4, start=9) == []


def test_every_as_a_function_of_the_step():
    assert refreshes(12, every=lambda step: 1 if step < 3 else 4) == [0, 1, 2, 6, 10]


def test_due():
    problem = mlp()
    geometry = bound(problem, every=5, start=3)
    assert [geometry.due(t) for t in (0, 2, 3, 4)] == [False, False, True, True]
    geometry.refresh([problem], step=4)
    assert [geometry.due(t) for t in (4, 8, 9, 50)] == [False, False, True, True]
    geometry.refresh([problem], step=6)  # also one that was not due counts
    assert [geometry.due(t) for t in (9, 10, 11)] == [False, False, True]


@pytest.mark.parametrize("name, value", [("lr", 0.05), ("ema", 0.4)])
def test_schedules_are_read_at_the_step(name, value):
    problem = mlp()
    seen = []

    def schedule(step: int) -> float:
        seen.append(step)
        return value if step == 7 else 0.001

    fixed, scheduled = (bound(problem, "kfac", **{name: v}) for v in (value, schedule))
    for geometry in (fixed, scheduled):
        geometry.refresh([problem], step=7)
    assert set(seen) == {7}
    same(scheduled.state(), fixed.state())
    other = bound(problem, "kfac", **{name: schedule})
    other.refresh([problem], step=8)
    assert not torch.equal(entries(other), entries(fixed))


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
    assert geometry.counters() == {"refreshes": 1, "refused": 1, "failures": 1, "last": 4}
    assert not geometry.due(5)
    geometry.refresh([problem], step=5)  # later ones are counted, without a warning
    assert geometry.counters() == {"refreshes": 2, "refused": 2, "failures": 2, "last": 5}


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
    assert geometry.counters() == {"refreshes": 3, "refused": 3, "failures": 3, "last": 2}
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
    assert geometry.counters() == {"refreshes": 3, "refused": 2, "failures": 0, "last": 2}
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
    with pytest.warns(UserWarning, match=r"negative eigenvalue \(constraint='square'\)"):
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


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "scalar", "dense", "diag-kfac"])
def test_square_is_for_e_kfac_alone(structure):
    with says(ValueError, "constraint", "'square'", "'e-kfac' alone", structure):
        bound(mlp(), structure, constraint="square")


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure, settings, stored",
    [
        ("identity", {}, 0),
        ("scalar", {}, 2),
        ("diagonal", {}, 57),
        ("diag-kfac", {}, (6 + 5 + 6) + (3 + 6 + 3)),
        ("kfac", {}, (36 + 25 + 6) + (9 + 36 + 3)),
        ("e-kfac", {}, (36 + 25 + 30 + 6) + (9 + 36 + 18 + 3)),
        ("e-kfac", {"bases": "gradient"}, (72 + 50 + 30 + 6) + (18 + 72 + 18 + 3)),
        ("dense", {}, 36**2 + 21**2),
        ("kfac", {"block_size": 4}, (32 + 17 + 20 + 5 + 6) + (25 + 13 + 3)),
        ("dense", {"block_size": 20}, 20**2 + 16**2 + 20**2 + 1),
    ],
)  # fmt: skip
def test_numel_and_memory(structure, settings, stored):
    """5-6-3; blocks of 4 cut 6x5 into (4, 4) (4, 1) (2, 4) (2, 1), and 3x6 into (3, 4) (3, 2)."""
    geometry = bound(mlp(torch.float32), structure, **settings)
    assert geometry.numel() == stored
    assert geometry.numel() == sum(v.numel() for e in geometry.state().values() for v in e.values())
    assert geometry.memory()["preconditioner"] == 4 * stored
    double = bound(mlp(), structure, **settings)
    assert double.numel() == stored and double.memory()["preconditioner"] == 8 * stored
    literal = bound(mlp(torch.float32), structure, tolerance=0, **settings)
    assert literal.memory()["refresh"] < geometry.memory()["refresh"]  # recycling costs memory


def mixed(name: str, parameter: Tensor) -> str:
    return {
        "cls": "scalar", "position": "kfac", "temperature": "scalar", "conv.weight": "e-kfac",
        "conv.bias": "identity", "up.weight": "dense", "up.bias": "dense",
        "embed.weight": "identity", "norm.weight": "kfac", "norm.bias": "diagonal",
    }.get(name, "diag-kfac")  # fmt: skip


def test_summary():
    geometry = bound(zoo(), mixed, block_size=4)
    lines = geometry.summary().splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["parameter", "shape", "structure", "blocks", "stored"],
        ["cls", "1x1x4", "scalar", "1", "1"],
        ["position", "1x7x4", "kfac", "2", str(16 + 16 + 9 + 16)],
        ["temperature", "scalar", "scalar", "1", "0"],
        ["conv.weight", "4x2x2x2", "e-kfac", "2", str(2 * 48)],
        ["conv.bias", "4", "identity", "1", "0"],
        ["up.weight", "4x3x2x2", "dense", "12", str(12 * 16)],
        ["up.bias", "3", "dense", "1", "9"],
        ["embed.weight", "5x4", "identity", "1", "0"],
        ["norm.weight", "4", "diagonal", "1", "4"],
        ["norm.bias", "4", "diagonal", "1", "4"],
        ["head.weight", "3x4", "diag-kfac", "1", "7"],
        ["head.bias", "3", "diagonal", "1", "3"],
    ]
    assert lines[-1] == f"163 parameters, {1 + 57 + 96 + 192 + 9 + 8 + 7 + 3} scalars in U"
    assert geometry.numel() == 373


def test_structures_by_a_function_of_name_and_parameter():
    problem = zoo()
    seen = []

    def structure(name: str, parameter: Tensor) -> str:
        assert parameter is dict(problem.model.named_parameters())[name]
        seen.append(name)
        return mixed(name, parameter)

    geometry = bound(problem, structure, block_size=4, lr=0.003, ema=0.0)
    assert seen == [n for n, _ in problem.model.named_parameters()]
    report = geometry.refresh([problem])
    assert report.accepted and report.change > 0.01
    U = explicit_U(problem.model, mixed, geometry.state(), 4)
    g = problem.matrices["g"]
    parts = dict(zip(geometry.parameters, torch.split(
        g, [p.numel() for p in geometry.parameters.values()]), strict=True))  # fmt: skip
    ug = geometry.apply({n: v.view(geometry.parameters[n].shape) for n, v in parts.items()})
    agree(vector(ug.values()), U @ g, 1e-12)
    assert torch.equal(ug["embed.weight"].reshape(-1), parts["embed.weight"])
    u = -U @ g
    J = float(g @ u + 0.5 * u @ problem.matrices["fisher"] @ u)
    assert report.J_after == pytest.approx(J, rel=1e-10)


def test_an_unknown_structure_of_a_function_names_the_parameter():
    with says(ValueError, "structure", "'kfc'", "'0.bias'"):
        bound(mlp(), lambda name, p: "kfc" if name == "0.bias" else "kfac")


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


# -- settings --------------------------------------------------------------------------------------


def test_paper_settings():
    fisher, newton = llqr.LLQR.paper("kfac", "fisher"), llqr.LLQR.paper("kfac", "newton")
    common = {
        "every": 500, "steps": 50, "lr": 1e-3, "momentum": 0.9, "clip": 5.0, "damping": 0.0,
        "bases": "learned", "constraint": "none", "block_size": None, "tolerance": 0,
        "solver": "momentum", "start": 0,
    }  # fmt: skip
    for geometry, ema, scale in ((fisher, 0.95, "sum"), (newton, 0.9, "mean")):
        assert {k: geometry.settings[k] for k in common} == common
        assert geometry.settings["ema"] == ema and geometry.settings["scale"] == scale
    assert isinstance(fisher.curvature, llqr.Fisher)
    assert isinstance(newton.curvature, llqr.Newton)
    changed = llqr.LLQR.paper("e-kfac", every=1000, ema=0.925)
    assert changed.settings["every"] == 1000 and changed.settings["ema"] == 0.925
    assert changed.settings["lr"] == 1e-3 and changed.structure == "e-kfac"


def test_repr_names_everything():
    text = repr(llqr.LLQR("kfac", curvature="newton", lr=0.5))
    assert text.startswith("LLQR('kfac', curvature=Newton(), ") and "lr=0.5" in text
    assert eval(text.replace("LLQR", "llqr.LLQR").replace("Newton", "llqr.Newton")).settings


# -- forwards --------------------------------------------------------------------------------------


def test_several_forwards_are_the_joined_batch():
    problem = mlp()
    joined, parts, weighted = (bound(problem, "kfac", ema=0.0) for _ in range(3))
    joined.refresh([problem])
    parts.refresh([problem.part(0, 6), problem.part(6, 12)])
    weighted.refresh([problem.part(0, 3), problem.part(3, 12)], weights=[1, 3])
    for geometry in (parts, weighted):
        torch.testing.assert_close(entries(geometry), entries(joined), rtol=1e-10, atol=1e-12)


def test_a_divergence_as_curvature():
    """KL gives the Fisher, so the same U; Renyi of order 2 what twice the Fisher gives."""
    problem = mlp()

    def renyi(z: Tensor, z0: Tensor) -> Tensor:
        return (2 * z.log_softmax(-1) - z0.log_softmax(-1)).logsumexp(-1).mean()

    settings = {"ema": 0.0, "tolerance": 0}
    twice = bound(problem, "kfac", scale=2.0, **settings)
    own = bound(problem, "kfac", curvature=llqr.Divergence(renyi), **settings)
    for geometry in (twice, own):
        assert geometry.refresh([problem]).accepted
    torch.testing.assert_close(entries(own), entries(twice), rtol=1e-10, atol=1e-12)


def test_newton_needs_the_loss_alone():
    problem = mlp()
    alone, both = (bound(problem, "kfac", curvature="newton") for _ in range(2))
    alone.refresh([problem.loss])
    both.refresh([problem])
    same(alone.state(), both.state())
    with says(ValueError, "loss alone"):
        bound(problem, "kfac").refresh([problem.loss])


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", ["learned", "gradient"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_round_trip(structure, bases):
    """Another geometry goes on bitwise: the same refreshes, the same U g."""
    problem = zoo()
    settings = {"bases": bases, "block_size": 4, "lr": 0.003, "ema": 0.5, "renew_every": 2}
    geometry, other = (bound(problem, structure, **settings) for _ in range(2))
    geometry.refresh([problem])
    other.load_state(copied(geometry))
    other.load_counters(geometry.counters())
    for _ in range(2):
        assert geometry.refresh([problem]).J_after == other.refresh([problem]).J_after
    same(other.state(), geometry.state())
    assert other.counters() == geometry.counters()
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    same(other.apply(g), geometry.apply(g))


def test_states_that_do_not_fit_change_nothing():
    geometry = bound(mlp(), "kfac")
    good = copied(bound(mlp(), "kfac"))
    for spoil, said in (
        (lambda s: s.pop("0.weight"), "no 'A.0'"),
        (lambda s: s["0.weight"].pop("B.0"), "no 'B.0'"),
        (lambda s: s["2.bias"].update(U=torch.ones(4)), r"shape \(4,\), expected \(3,\)"),
    ):
        state = {n: dict(e) for n, e in good.items()}
        spoil(state)
        before = copied(geometry)
        with says(ValueError, "state", "kfac", said):
            geometry.load_state(state)
        same(copied(geometry), before)


def test_binding_again_with_more_parameters_keeps_u():
    problem = zoo()
    named = dict(problem.model.named_parameters())
    late = ("cls", "position", "conv.weight")  # early in the model: blocks move in the layout
    geometry = llqr.LLQR("kfac", block_size=3, ema=0.0, lr=0.003)
    geometry.bind(problem.model, {n: p for n, p in named.items() if n not in late})
    assert geometry.refresh([problem]).accepted
    before = copied(geometry)
    geometry.bind(problem.model, named)
    assert list(geometry.state()) == list(named)
    for name, own in copied(geometry).items():
        if name in before:
            same(own, before[name])
        else:
            for key, value in own.items():
                eye = torch.eye(len(value), dtype=F64) if value.dim() == 2 else value * 0 + 1
                assert torch.equal(value, eye), (name, key)


# -- using U ---------------------------------------------------------------------------------------


def test_unbound_geometries_say_what_to_do():
    geometry = llqr.LLQR("kfac")
    for use in (
        lambda: geometry.apply({}),
        geometry.spectrum,
        geometry.numel,
        geometry.memory,
        geometry.summary,
        geometry.state,
        lambda: geometry.load_state({}),
        lambda: geometry.refresh([lambda: None]),
    ):
        with says(RuntimeError, "LLQR knows no parameters yet", "llqr.Optimizer"):
            use()


def test_unknown_gradients_are_named():
    with says(KeyError, "gradients", "'head'"):
        bound(mlp()).apply({"head": torch.zeros(3)})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_absent_gradients_count_as_zero(structure):
    """U g of the names given alone; in `dense` and `scalar` layers too."""
    problem = zoo()
    geometry = bound(problem, structure, ema=0.0, lr=0.003)
    geometry.refresh([problem])
    whole = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    given = ("head.bias", "position", "up.weight")
    zeros = {n: v if n in given else 0 * v for n, v in whole.items()}
    expected = geometry.apply(zeros)
    found = geometry.apply({n: whole[n] for n in given})
    assert list(found) == list(given)
    same(found, {n: expected[n] for n in given})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_precision_of_u_and_of_what_it_returns(structure):
    """U is float32 for half precision; U g has the gradient's dtype; g is not changed."""
    model = Zoo().to(torch.bfloat16)
    geometry = llqr.LLQR(structure)
    geometry.bind(model)
    for own in geometry.state().values():
        assert all(v.dtype == torch.float32 for v in own.values())
    g = {n: torch.randn(p.shape).bfloat16() for n, p in model.named_parameters()}
    before = {n: v.clone() for n, v in g.items()}
    ug = geometry.apply(g)
    assert all(v.dtype == torch.bfloat16 for v in ug.values())
    same(ug, before)  # U = I
    same(g, before)
    for n, v in ug.items():
        v.zero_()
        assert torch.equal(g[n], before[n])


def test_one_device():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with says(ValueError, "one device", "cpu", "meta"):
        llqr.LLQR("kfac").bind(model)


def test_a_refresh_sees_batch_norm_in_evaluation_mode():
    """Through the optimizer: the learned U is that of the network in evaluation mode."""
    problem = norm_net(dropout=0.5)
    optimizer = optimizer_of(problem, geometry=llqr.LLQR("kfac", ema=0.0))
    problem.model.train()
    optimizer.refresh(problem)
    assert problem.model.training
    alone = bound(problem, "kfac", ema=0.0)
    alone.refresh([problem])
    same(optimizer.geometry.state(), alone.state())
