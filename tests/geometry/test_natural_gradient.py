"""U in closed form against its formula written out: samples, averages, bases, eigenvalues."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from allocations import peak_of_allocations
from explicit import agree, gauss_newton, vector
from llqr.curvature import curvature_samples
from llqr.geometry.structures import ClosedForm, Structure, verify_structure
from llqr.geometry.structures.closed_form import CLOSED_FORMS
from moments import ByHand
from tiny import (
    F64,
    Problem,
    everything,
    mlp,
    natural_of,
    optimizer_of,
    same,
    says,
    scaler_of,
    train,
)

STRUCTURES = sorted({kind.name for kind in CLOSED_FORMS})
DAMPING, EMA = 0.1, 0.8


def images():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )  # fmt: skip
    return Problem(model.double(), torch.randn(60, 2, 2, 2, dtype=F64), torch.randint(3, (60,)))


def text():
    """An embedding with tied weights."""
    torch.manual_seed(1)
    embedding, tied = nn.Embedding(7, 4).double(), nn.Linear(4, 7, bias=False).double()
    tied.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4).double(), nn.Tanh(), tied)
    return Problem(model, torch.arange(63) % 7, torch.randint(7, (63,)))


def mixed(name, parameter):
    return {"0.weight": "e-kfac", "0.bias": "identity", "2.weight": "scalar"}.get(name, "dense")


NETS = {"mlp": mlp, "images": images, "text": text}


def bound(problem, structure="e-kfac", **settings):
    settings = {"samples": 25, "damping": DAMPING, "ema": EMA, "renew_every": 1, **settings}
    geometry = llqr.NaturalGradient(structure, **settings)
    geometry.bind(problem.model)
    return geometry


def draw(geometry, *forwards):
    """The samples that the coming refresh of a geometry will draw, (m, P)."""
    parameters = [p for p in geometry.parameters.values() if p.requires_grad]
    samples = curvature_samples(forwards, parameters, geometry.curvature)
    drawn = samples.draw(geometry.settings.samples, geometry._generator())
    return torch.cat([w.reshape(len(w), -1) for w in drawn], 1)


def moved(problem):
    """Other weights, and so another curvature."""
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def check_U(geometry, U, tolerance=1e-8):
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    agree(vector(geometry.apply(g).values()), U @ vector(g.values()), tolerance)


def matrix_of(geometry):
    """U as a matrix in model order."""
    like = {n: torch.zeros_like(p) for n, p in geometry.parameters.items()}
    size = sum(p.numel() for p in like.values())
    columns = []
    for unit in torch.eye(size, dtype=F64):
        parts = torch.split(unit, [p.numel() for p in like.values()])
        g = {n: x.view_as(p) for (n, p), x in zip(like.items(), parts, strict=True)}
        columns.append(vector(geometry.apply(g).values()))
    return torch.stack(columns, 1)


def curvature_matrix(problem, factor=1.0):
    parameters = list(problem.model.parameters())
    return gauss_newton(
        problem.model(problem.x), lambda z: factor * F.cross_entropy(z, problem.y), parameters
    )


# -- the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net, structure, block_size",
    [
        *(("mlp", structure, 4) for structure in (*STRUCTURES, mixed)),
        *(("images", structure, None) for structure in STRUCTURES),
        *(("text", structure, 3) for structure in ("kfac", "e-kfac", "dense", "scalar")),
    ],
)
def test_formula(net, structure, block_size):
    problem = NETS[net]()
    geometry = bound(problem, structure, block_size=block_size)
    by_hand = ByHand(problem.model, structure, block_size, damping=DAMPING, ema=EMA)
    for step in range(3):
        if structure != "identity":
            by_hand.refresh(draw(geometry, problem))
        report = geometry.refresh([problem], step=step)
        assert report.accepted and report.samples == 25 and report.J_before is None
        moved(problem)
    check_U(geometry, torch.eye(by_hand.size, dtype=F64) if structure == "identity" else by_hand.U)
    ends = geometry.spectrum()
    values = torch.linalg.eigvalsh(matrix_of(geometry))
    assert min(low for low, _ in ends.values()) == pytest.approx(float(values[0]), rel=1e-6)
    assert max(high for _, high in ends.values()) == pytest.approx(float(values[-1]), rel=1e-6)
    if structure is not mixed:
        assert float(values.mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    "settings, by_hand",
    [
        ({"power": 0.5}, {"power": 0.5}),
        ({"damping": 2.0}, {"damping": 2.0}),
        ({"ema": 0.0}, {"ema": 0.0}),
        ({"ema": lambda step: 0.3}, {"ema": 0.3}),
        ({"renew_every": 2}, {"period": 2}),
    ],
)
@pytest.mark.parametrize("structure", ["e-kfac", "kfac"])
def test_settings(structure, settings, by_hand):
    problem = mlp()
    geometry = bound(problem, structure, **settings)
    expected = ByHand(problem.model, structure, **{"damping": DAMPING, "ema": EMA, **by_hand})
    for step in range(3):
        expected.refresh(draw(geometry, problem))
        geometry.refresh([problem], step=step)
        moved(problem)
    check_U(geometry, expected.U)


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal", "diag-kfac", "dense"])
def test_U_does_not_depend_on_the_scale_of_the_loss(structure):
    """Times 1,000, times 1e-6, the sum over rows in place of the mean."""
    problem, found = mlp(), []
    for factor in (1.0, 1e3, 1e-6, 12.0):

        def forward(factor=factor):
            loss, z = problem()
            return factor * loss, z

        geometry = bound(problem, structure, curvature=llqr.Fisher())
        geometry.refresh([forward])
        found.append(matrix_of(geometry))
    for other in found[1:]:
        agree(other, found[0], 1e-9)


@pytest.mark.parametrize("structure", ["e-kfac", "diagonal"])
def test_it_is_the_least_of_J_in_expectation(structure):
    """E J(U) = -tr U + tr(U (C + lambda) U) / 2 over the eigenvalues of U in its bases."""
    problem = mlp()
    geometry = bound(problem, structure, samples=1500)
    geometry.refresh([problem])
    U, C = matrix_of(geometry), curvature_matrix(problem)
    lam = DAMPING * C.trace() / len(C)
    if structure == "diagonal":
        Q = torch.eye(len(C), dtype=F64)
    else:
        state = geometry.state()
        parts = [
            torch.kron(state[n]["QB.0"], state[n]["QA.0"]) if "QB.0" in state[n]
            else torch.eye(p.numel(), dtype=F64) for n, p in geometry.parameters.items()
        ]  # fmt: skip
        Q = torch.block_diag(*parts)
    damped = (Q.mT @ C @ Q).diagonal() + lam

    def J(s):
        return float(-s.sum() + 0.5 * (s.square() * damped).sum())

    least = 1 / damped
    for _ in range(5):
        assert J(least * (1 + 0.1 * torch.randn_like(least))) > J(least)
    s = (Q.mT @ U @ Q).diagonal()
    agree(Q @ torch.diag(s) @ Q.mT, U, 1e-9)  # U is diagonal there

    def J_at_best_scale(s):
        return J(s * s.sum() / (s.square() * damped).sum())

    # 1,500 samples tell M to 4 %, and J is flat at its least value.
    assert J_at_best_scale(s) < 0.99 * J(least)
    assert J_at_best_scale(torch.ones_like(s)) > 0.8 * J(least)


def test_several_forwards_share_the_samples():
    """What is drawn of two halves has the second moment of the joined batch."""
    problem = mlp()
    halves = [problem.part(0, 6), problem.part(6, 12)]
    geometry = bound(problem, "diagonal", samples=800)
    by_hand = ByHand(problem.model, "diagonal", damping=DAMPING, ema=EMA)
    by_hand.refresh(draw(geometry, *halves))
    geometry.refresh(halves)
    check_U(geometry, by_hand.U)
    M = vector(entry["M"] for entry in geometry.state().values())
    C = curvature_matrix(problem).diagonal()
    assert float((M - C).norm() / C.norm()) < 0.1
    assert float((M - C.flip(0)).norm() / C.norm()) > 0.3


def test_samples_come_from_the_seed_alone():
    problem, found = mlp(), []
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.get_rng_state()
        geometry = bound(problem, seed=seed)
        geometry.refresh([problem])
        assert torch.equal(torch.get_rng_state(), state)
        first = geometry.state()
        geometry.refresh([problem], step=1)  # new samples
        assert not torch.equal(geometry.state()["0.weight"]["M.0"], first["0.weight"]["M.0"])
        found.append(geometry.state())
    torch.set_rng_state(before)
    same(found[0], found[1])
    assert not torch.equal(found[0]["0.weight"]["M.0"], found[2]["0.weight"]["M.0"])


# -- following gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["e-kfac", "diagonal"])
@pytest.mark.parametrize("scaled", [False, True])
def test_M_follows_the_clean_gradients(structure, scaled):
    """Those of steps that count, at the weights, not where the probe is."""
    problem = mlp()
    geometry = llqr.NaturalGradient(
        structure,
        second_moment="gradients",
        gradient_ema=0.7,
        every=3,
        ema=EMA,
        damping=DAMPING,
        renew_every=1,
    )
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=llqr.SAM(0.1))
    by_hand = ByHand(problem.model, structure, damping=DAMPING, ema=EMA)
    scaler = scaler_of() if scaled else None
    for step in range(5):
        if step % 3 == 0:
            by_hand.refresh(draw(geometry, problem), keep_moments=True)
        g = vector(problem.gradient().values())
        optimizer.minimize(problem, scaler=scaler)
        by_hand.observe(g, 0.7)
        check_U(geometry, by_hand.U)
    before = copy.deepcopy(geometry.state())
    problem.x = problem.x * float("nan")  # skipped: it does not count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.minimize(problem, scaler=scaler)
    same(geometry.state(), before)


@pytest.mark.parametrize("structure", ["kfac", "dense"])
def test_what_cannot_follow_gradients_is_refused(structure):
    with says(ValueError, "second_moment", structure, "'samples'"):
        llqr.NaturalGradient(structure, second_moment="gradients")
    geometry = llqr.NaturalGradient(lambda *_: structure, second_moment="gradients")
    with says(ValueError, "second_moment", structure):
        geometry.bind(mlp().model)


# -- parameters that stay, come and have no curvature ----------------------------------------------


@pytest.mark.parametrize("mode", ["samples", "gradients"])
@pytest.mark.parametrize("structure", ["e-kfac", "diagonal"])
def test_frozen_parameters_keep_U_and_have_no_part_in_its_scale(structure, mode):
    problem = mlp()
    geometry = natural_of(structure, second_moment=mode, damping=DAMPING, ema=EMA, every=1)
    optimizer = optimizer_of(problem, geometry=geometry)
    train(optimizer, problem, 2)
    for p in problem.model[0].parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(geometry.state())
    train(optimizer, problem, 2)
    for name in ("0.weight", "0.bias"):
        same(geometry.state()[name], before[name])
    assert not torch.equal(geometry.state()["2.bias"]["U"], before["2.bias"]["U"])
    U = matrix_of(geometry)
    assert float(U[36:, 36:].diagonal().mean()) == pytest.approx(1)


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal", "scalar", "dense"])
def test_parameters_that_join_start_their_averages_anew(structure):
    """As if the others' averages were theirs: not small by the weight of one term."""
    problem = mlp()
    base = torch.optim.SGD(problem.model[0].parameters(), lr=0.0)
    geometry = natural_of(structure, every=10**6, damping=DAMPING, ema=EMA)
    optimizer = optimizer_of(problem, base, geometry=geometry)
    for _ in range(3):
        optimizer.refresh(problem)
    optimizer.add_param_group({"params": list(problem.model[2].parameters())})
    late = ByHand(problem.model[2], structure, damping=DAMPING, ema=EMA)
    w = draw(geometry, problem)
    optimizer.refresh(problem)
    late.refresh(w[:, 36:])
    found = matrix_of(geometry)[36:, 36:]
    # Its own lambda and c are those of all parameters: the same eigenvectors and order of values.
    agree(found @ late.U, late.U @ found, 1e-9)
    entries = {n: e for n, e in geometry.state().items() if n.startswith("2.")}
    if structure == "kfac":
        x = w[:, 36:54].view(-1, 3, 6)
        agree(entries["2.weight"]["L.0"], (x @ x.mT).mean(0), 1e-9)
    else:
        kept = [v.sum() for e in entries.values() for k, v in e.items() if k[0] == "M"]
        expected = torch.cat([known["M"] for known in late.known.values()])
        expected = expected[:1] if structure == "scalar" else expected
        assert float(sum(kept)) == pytest.approx(float(expected.sum()), rel=1e-9)


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diag-kfac", "diagonal", "dense"])
def test_a_head_that_no_sample_reaches_changes_nothing(structure):
    """It would have the largest U, and the mean of U is 1."""
    problem, larger = mlp(), mlp()
    larger.model.add_module("unused", nn.Linear(40, 40).double())
    larger.model.forward = lambda x: larger.model[2](larger.model[1](larger.model[0](x)))
    alone, beside = natural_of(structure), natural_of(structure)
    optimizer_of(problem, geometry=alone).refresh(problem)
    optimizer_of(larger, geometry=beside).refresh(larger)
    g = {n: torch.randn_like(p) for n, p in beside.parameters.items()}
    moved, expected = beside.apply(g), alone.apply({n: g[n] for n in alone.parameters})
    for name, v in g.items():
        torch.testing.assert_close(moved[name], expected.get(name, v))


def test_a_network_that_has_become_certain_is_refused_and_is_no_failure():
    problem = mlp()
    geometry = natural_of(max_failures=0)
    optimizer = optimizer_of(problem, geometry=geometry)
    train(optimizer, problem, 1)
    before = copy.deepcopy(geometry.state())
    with torch.no_grad():
        problem.model[2].bias.copy_(torch.tensor([4000.0, 0, 0]))
    problem.y.zero_()
    with pytest.warns(UserWarning, match="no curvature in its outputs"):
        for _ in range(3):
            assert not optimizer.refresh(problem).accepted
    counters = {"refreshes": 4, "refused": 3, "failures": 0, "saturated": 3, "last": 1}
    assert geometry.counters() == counters
    same(geometry.state(), before)
    fresh = optimizer_of(problem, geometry=natural_of(max_failures=0))
    with pytest.warns(UserWarning, match="no curvature in its outputs"):
        assert not fresh.refresh(problem).accepted


def test_a_loss_that_loses_its_convexity_in_training_is_refused_and_ends_nothing():
    """At first it is an error: its user can change it. Later it may be rounding, too."""
    problem = mlp()
    sign = 1.0

    def forward():
        z = problem.model(problem.x)
        return sign * torch.logsumexp(z.reshape(-1) * 2, 0), z

    geometry = natural_of(max_failures=0)
    optimizer = optimizer_of(problem, geometry=geometry)
    assert optimizer.refresh(forward).accepted
    before, sign = copy.deepcopy(geometry.state()), -1.0
    with pytest.warns(UserWarning, match="refused because the loss's second derivative"):
        assert not optimizer.refresh(forward).accepted
    same(geometry.state(), before)
    fresh = optimizer_of(problem, geometry=natural_of(max_failures=0))
    with says(ValueError, "positive semidefinite", "logits"):
        fresh.refresh(forward)


@pytest.mark.parametrize(
    "factor, steps", [(float("nan"), 1), (float("inf"), 1), (1e60, 1), (1e-42, 0)]
)
@pytest.mark.parametrize("structure", ["e-kfac", "diagonal"])
def test_samples_whose_squares_are_not_finite_are_refused(structure, factor, steps):
    """Also those whose squares are lost to rounding at the first refresh."""
    problem = mlp(torch.float32)
    geometry = natural_of(structure, max_failures=1)
    optimizer = optimizer_of(problem, geometry=geometry)
    train(optimizer, problem, steps)
    before = copy.deepcopy(geometry.state())

    def bad(z, z0):
        return 0.5 * (z.double() - z0.double()).square().sum() * factor

    geometry.curvature = llqr.Divergence(bad)
    with pytest.warns(UserWarning, match="refused"):
        report = optimizer.refresh(problem)
    assert not report.accepted and "samples" in report.reason
    same(geometry.state(), before)
    with pytest.raises(llqr.RefreshError):
        optimizer.refresh(problem)


# -- structures of one's own -----------------------------------------------------------------------


class Rows(Structure):
    """One number per row of a matrix: U X = diag(b) X."""

    name, trainable, cut = "rows", ("b",), "rectangles"

    def identity(self, device):
        return {"b": self.batch_of_ones(self.group.matrix_shape[0], device=device)}

    def apply(self, state, x):
        return state["b"][:, :, None] * x

    def project(self, state, bounds):
        return {"b": state["b"].clamp(*bounds)}


class RowMoments(ClosedForm, Rows):
    """M is the mean of the squares in a row."""

    eigenvalue_entry = "b"

    def identity(self, device):
        state = Rows.identity(self, device)
        return {**state, "M": torch.zeros_like(state["b"])}

    def squares(self, state, x):
        return x.square().mean((0, 3))

    def trace(self, values):
        return values.sum() * self.group.matrix_shape[1]


def test_a_structure_of_ones_own():
    verify_structure(RowMoments)
    problem = mlp()
    geometry = bound(problem, RowMoments)
    w = draw(geometry, problem)
    geometry.refresh([problem])
    parts = torch.split(w.square().mean(0), [30, 6, 18, 3])
    rows = [parts[0].view(6, 5).mean(1).repeat_interleave(5), parts[1],
            parts[2].view(3, 6).mean(1).repeat_interleave(6), parts[3]]  # fmt: skip
    moments = torch.cat(rows)
    s = 1 / (moments + DAMPING * moments.mean())
    check_U(geometry, torch.diag(s / s.mean()))
    with says(ValueError, "'rows' has no closed form", "kfac", "ClosedForm"):
        llqr.NaturalGradient(Rows)


# -- what it tells ---------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_J_on_request(structure):
    problem = mlp()
    geometry = bound(problem, structure, report_J=True)
    g = vector(problem.gradient().values())
    C = curvature_matrix(problem)
    for step in range(2):
        before = matrix_of(geometry)
        report = geometry.refresh([problem], step=step)
        for found, U in ((report.J_before, before), (report.J_after, matrix_of(geometry))):
            u = -U @ g
            assert found == pytest.approx(float(g @ u + 0.5 * u @ C @ u), rel=1e-9)
        assert report.products == 2 and "J " in str(report)


def test_J_at_a_scale_that_is_not_learned_is_no_warning():
    problem = mlp()

    def steep():
        loss, z = problem()
        return 1e3 * loss, z

    geometry = bound(problem, report_J=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert geometry.refresh([steep]).J_after > 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_numel_memory_and_summary(structure):
    problem = mlp(torch.float32)
    geometry = bound(problem, structure)
    stored = sum(v.numel() for entry in geometry.state().values() for v in entry.values())
    assert geometry.numel() == stored
    assert geometry.memory()["preconditioner"] == 4 * stored
    assert geometry.memory()["refresh"] >= 25 * 57 * 4
    assert geometry.summary().splitlines()[-1] == f"57 parameters, {stored:,} scalars in U"
    assert f" {structure} " in geometry.summary()


@pytest.mark.parametrize("sides", [(64, 96, 48, 48), (96, 96, 96)])
@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal", "dense"])
def test_memory_of_a_refresh_is_what_it_allocates(structure, sides):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sides)))
    problem = Problem(model, torch.randn(2, sides[0]), torch.randint(48, (2,)))
    geometry = bound(problem, structure, samples=8, block_size=96)
    geometry.refresh([problem])
    measured = peak_of_allocations(lambda: geometry.refresh([problem], step=1))
    assert geometry.memory()["refresh"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"samples": 0}, ("samples", "0")),
        ({"damping": 0.0}, ("damping", "0")),
        ({"power": 2.0}, ("power", "2.0")),
        ({"ema": 1.0}, ("ema", "1")),
        ({"second_moment": "both"}, ("second_moment", "both")),
        ({"gradient_ema": 1.0}, ("gradient_ema", "1")),
        ({"renew_every": 0}, ("renew_every", "0")),
        ({"seed": -1}, ("seed", "-1")),
        ({"structure": "hexagonal"}, ("structure", "hexagonal")),
        ({"curvature": "newton"}, ("curvature", "Newton", "LLQR")),
    ],
)
def test_values_out_of_range_are_named(settings, parts):
    with says(ValueError, *parts):
        llqr.NaturalGradient(**settings)
    with says(TypeError, "report_J", "yes"):
        llqr.NaturalGradient(report_J="yes")


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [*STRUCTURES, mixed])
def test_a_state_goes_over_bitwise(structure):
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=natural_of(structure))
    train(optimizer, problem, 3)
    other = mlp()
    fresh = optimizer_of(other, geometry=natural_of(structure))
    other.model.load_state_dict(problem.model.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, problem, 3)
    train(fresh, other, 3)
    same(everything(fresh), everything(optimizer))
