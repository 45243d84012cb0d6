"""Autocast in bfloat16 and float16; what GradScaler needs besides is in test_scaler.py."""

import warnings

import pytest
import torch
from torch import nn

import llqr
from byhand import length, sam_step
from tables import BASES, FUSED, LEFT_OUT, NO_FOREACH, PERTURBATIONS
from tiny import (
    SCALED_WAYS,
    STRUCTURES,
    WAYS,
    Problem,
    everything,
    gradients,
    llqr_of,
    mlp,
    optimizer_of,
    poisoned,
    same,
    scaler_of,
    sgd,
    train,
    weights,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Cast(Problem):
    """A float32 network whose forward runs in autocast."""

    def __init__(self, low, seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 3))
        super().__init__(model, torch.randn(12, 5), torch.randint(3, (12,)))
        self.low = low

    def __call__(self):
        self.calls += 1
        with torch.autocast("cpu", self.low):
            z = self.model(self.x)
            return nn.functional.cross_entropy(z.float(), self.y), z


def quiet_refreshes():
    return pytest.warns(UserWarning, match="autocast is switched off during a refresh")


# -- autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("low", [BF16, F16])
def test_sam_in_autocast_is_the_hand_written_loop(low, way):
    ours, theirs = Cast(low), Cast(low)
    optimizer, base = optimizer_of(ours, perturbation=llqr.SAM(0.1)), sgd(theirs, momentum=0.9)
    for _ in range(5):
        train(optimizer, ours, 1, way)
        sam_step(base, theirs.backward, 0.1)
    same(weights(ours.model), weights(theirs.model))
    assert {p.dtype for p in ours.model.parameters()} == {F32}
    assert ours()[1].dtype == low


@pytest.mark.parametrize("low", [BF16, F16])
@pytest.mark.parametrize("probe", [name for name in PERTURBATIONS if name != "none"])
def test_all_ways_agree_bit_for_bit_in_autocast(probe, low):
    ends = []
    for way in WAYS:
        problem = Cast(low)
        optimizer = optimizer_of(
            problem, perturbation=PERTURBATIONS[probe](), geometry=llqr_of("kfac")
        )
        with quiet_refreshes():
            train(optimizer, problem, 5, way)
        ends.append(everything(optimizer))
    for end in ends[1:]:
        same(end, ends[0])


def test_a_refresh_ignores_autocast_inside_and_around():
    """U is that of the float32 network, and the warning comes once."""
    inside, around, plain = Cast(BF16), mlp_like(), mlp_like()
    states = []
    for problem, outer in ((inside, False), (around, True), (plain, False)):
        optimizer = optimizer_of(problem, geometry=llqr_of("kfac"))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with torch.autocast("cpu", BF16, enabled=outer):
                optimizer.refresh(problem)
                optimizer.refresh(problem)
                assert torch.is_autocast_enabled("cpu") is outer
        assert len(found) == (problem is inside)
        states.append(optimizer.geometry.state())
    same(states[0], states[2])
    same(states[1], states[2])


def mlp_like():
    problem = Cast(BF16)
    return Problem(problem.model, problem.x, problem.y)


def test_refresh_autocast_leaves_it_on():
    problem, plain = Cast(BF16), mlp_like()
    cast = optimizer_of(problem, geometry=llqr_of("kfac"), refresh_autocast=True)
    full = optimizer_of(plain, geometry=llqr_of("kfac"))
    report, exact = cast.refresh(problem), full.refresh(plain)
    assert report.accepted
    assert report.J_before != exact.J_before
    assert report.J_before == pytest.approx(exact.J_before, rel=0.05)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("low", [BF16, F16])
def test_u_acts_in_full_precision_within_autocast(low, structure):
    """Manual loops in frameworks run passes and step under autocast: eps and U g stay float32."""
    ends = []
    for enabled in (True, False):
        problem = mlp(F32)
        optimizer = optimizer_of(
            problem, geometry=llqr_of(structure), perturbation=llqr.SAM(0.3), graft=True
        )
        optimizer.refresh(problem)
        problem.backward()
        with torch.autocast("cpu", low, enabled=enabled):
            with optimizer.perturbed():
                there = weights(problem.model)
                with torch.autocast("cpu", enabled=False):
                    problem.backward()
            optimizer.step()
        ends.append((there, weights(problem.model)))
    same(*ends)


# -- float16 with a scaler -------------------------------------------------------------------------


def by_hand_scaled(base, problem, scaler, rho):
    """SAM with a GradScaler as its users write it: both backwards scaled, one unscale a pass."""
    held = list(problem.model.parameters())
    base.zero_grad()
    scaler.scale(problem.loss()).backward()
    with torch.no_grad():
        true = [p.grad / scaler.get_scale() for p in held]
        norm = length(true)
        clean = [p.clone() for p in held]
        healthy = bool(norm.isfinite())
        if healthy:
            for p, g in zip(held, true, strict=True):
                p.add_(g * (rho / norm))
    if healthy:
        base.zero_grad()
        scaler.scale(problem.loss()).backward()
    with torch.no_grad():
        for p, value in zip(held, clean, strict=True):
            p.copy_(value)
    scaler.step(base)
    scaler.update()


@pytest.mark.parametrize("way", SCALED_WAYS)
def test_float16_overflows_come_down_and_train(way):
    """The scale starts above what float16 holds: real infinities, then the hand-written run."""
    ours, theirs = Cast(F16), Cast(F16)
    optimizer, base = optimizer_of(ours, perturbation=llqr.SAM(0.1)), sgd(theirs, momentum=0.9)
    one, two = scaler_of(2.0**24), scaler_of(2.0**24)
    start, skipped = weights(ours.model), 0
    for _ in range(16):
        scale = one.get_scale()
        SCALED_WAYS[way](optimizer, ours, one)
        by_hand_scaled(base, theirs, two, 0.1)
        assert one.get_scale() == two.get_scale()
        if one.get_scale() < scale:
            skipped += 1
            if skipped == optimizer.state_dict()["param_groups"][0]["llqr.step"] + skipped:
                same(weights(ours.model), start)
    assert skipped > 3
    counted = optimizer.state_dict()["param_groups"][0]
    assert counted["llqr.step"] == 16 - skipped > 3
    assert counted["llqr.skipped_steps"] == 0  # the scaler skips: step() is never called
    same(weights(ours.model), weights(theirs.model))


@pytest.mark.parametrize("way", SCALED_WAYS)
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("probe", [name for name in PERTURBATIONS if name != "none"])
def test_an_infinity_leaves_no_trace_in_any_way(probe, when, way):
    """No buffers here, so that perturbed() too gives back all of the step's start."""
    if (probe, when) == ("MSAM", 1):
        pytest.skip("MSAM has one pass")
    runs = []
    for fault in (True, False):
        problem = Cast(F16)
        optimizer = optimizer_of(
            problem,
            torch.optim.AdamW(problem.model.parameters(), lr=0.01),
            perturbation=PERTURBATIONS[probe](),
            geometry=llqr_of("kfac", every=3),
        )
        scaler = scaler_of()
        with quiet_refreshes():
            for _ in range(2):
                SCALED_WAYS[way](optimizer, problem, scaler)
        if fault:
            before = everything(optimizer)
            poisoned(problem, {when}, float("inf"))
            SCALED_WAYS[way](optimizer, problem, scaler)
            same(everything(optimizer), before)
            assert scaler.get_scale() == 2.0**9
        scaler = scaler_of()  # the same scale again, so that float16 rounds alike
        for _ in range(3):
            SCALED_WAYS[way](optimizer, problem, scaler)
        runs.append(everything(optimizer))
    same(*runs)


@pytest.mark.parametrize("probe", ["ASAM", "FisherSAM", "FriendlySAM", "SAM"])
def test_the_probe_is_computed_from_unscaled_gradients(probe):
    """Scale 2**20 in perturbed(): ASAM and SAM are homogeneous, the other two would differ."""
    moved = []
    for scaler in (scaler_of(2.0**20), None):
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=PERTURBATIONS[probe]())
        for _ in range(2):  # FriendlySAM's memory is zero at first
            start = weights(problem.model)
            loss = problem.loss()
            optimizer.zero_grad()
            (loss if scaler is None else scaler.scale(loss)).backward()
            with optimizer.perturbed(scaler):
                there = weights(problem.model)
                loss = problem.loss()
                (loss if scaler is None else scaler.scale(loss)).backward()
            moved.append({n: there[n] - start[n] for n in start})
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    same(moved[:2], moved[2:])


# -- fused and foreach bases -----------------------------------------------------------------------

FORMS = [
    (base, form)
    for base in BASES
    if base not in LEFT_OUT
    for form, lacking in (("foreach", base in NO_FOREACH), ("fused", base not in FUSED))
    if not lacking
]


@pytest.mark.parametrize("way", SCALED_WAYS)
@pytest.mark.parametrize("base, form", FORMS)
def test_fused_and_foreach_bases_under_a_scaler_are_exact(base, form, way):
    """torch hands a fused base the scale itself; under us it sees plain gradients: bit for bit."""
    ends = []
    for scaled in (True, False):
        problem = mlp(F32)
        optimizer = optimizer_of(
            problem,
            BASES[base](problem.model.parameters(), **{form: True}),
            geometry=llqr_of("kfac"),
            perturbation=llqr.SAM(0.1),
        )
        assert not hasattr(optimizer, "_step_supports_amp_scaling")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for _ in range(3):
            SCALED_WAYS[way](optimizer, problem, scaler)
        assert all(bool(g.isfinite().all()) for g in gradients(problem.model).values())
        ends.append(everything(optimizer))
    same(*ends)


def test_a_fused_base_alone_does_have_the_attribute():
    """So that the assertion above can fail."""
    base = torch.optim.Adam(mlp(F32).model.parameters(), fused=True)
    assert base._step_supports_amp_scaling is True
