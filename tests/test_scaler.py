"""torch.amp.GradScaler (on the CPU) drives our optimizer as it drives its base."""

import copy

import pytest
import torch

import llqr
from tiny import (
    SCALED_WAYS,
    everything,
    gradients,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    poisoned,
    same,
    scaler_of,
    train,
    weights,
)

PROBES = {
    "none": lambda: None,
    "SAM": lambda: llqr.SAM(0.3),
    "ASAM": lambda: llqr.ASAM(0.3),
    "FisherSAM": lambda: llqr.FisherSAM(0.3),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.3),
}


def start(probe, make=norm_net, **options):
    problem = make()
    optimizer = optimizer_of(
        problem, perturbation=PROBES[probe](), geometry=llqr_of("kfac", every=3), **options
    )
    return problem, optimizer


@pytest.mark.parametrize("way", SCALED_WAYS)
@pytest.mark.parametrize("probe", PROBES)
def test_a_finite_run_equals_the_unscaled_one(probe, way):
    """The scale is a power of two, so that scaling rounds nothing: equal bit for bit."""
    problem, optimizer = start(probe)
    plain, unscaled = start(probe)
    scaler = scaler_of(growth_interval=2)
    for _ in range(5):
        SCALED_WAYS[way](optimizer, problem, scaler)
    train(unscaled, plain, 5)
    assert scaler.get_scale() == 2.0**12
    same(everything(optimizer), everything(unscaled))


@pytest.mark.parametrize("way", ["minimize", "passes", "passes, step unscales"])
@pytest.mark.parametrize("probe, when", [(p, 0) for p in PROBES] + [("SAM", 1), ("FriendlySAM", 1)])
def test_an_overflow_skips_the_step_and_halves_the_scale(probe, when, way):
    problem, optimizer = start(probe)
    scaler = scaler_of()
    SCALED_WAYS[way](optimizer, problem, scaler)
    before = everything(optimizer)
    poisoned(problem, {when}, float("inf"))
    SCALED_WAYS[way](optimizer, problem, scaler)
    assert scaler.get_scale() == 2.0**9
    same(everything(optimizer), before)
    SCALED_WAYS[way](optimizer, problem, scaler)
    after, undisturbed = start(probe)
    train(undisturbed, after, 2)
    same(everything(optimizer), everything(undisturbed))


@pytest.mark.parametrize("when", [0, 1])
def test_an_overflow_in_perturbed(when):
    problem, optimizer = start("SAM", mlp)
    scaler = scaler_of()
    SCALED_WAYS["perturbed"](optimizer, problem, scaler)
    before = everything(optimizer)
    poisoned(problem, {when}, float("inf"))
    SCALED_WAYS["perturbed"](optimizer, problem, scaler)
    assert scaler.get_scale() == 2.0**9
    same(everything(optimizer), before)


def test_a_scale_that_is_too_large_comes_down():
    """Scaled beyond float32 the gradients are inf; nothing moves until they are not."""
    problem = norm_net(torch.float32)
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.1))
    scaler = scaler_of(2.0**127)
    before = everything(optimizer)
    for _ in range(30):
        scale = scaler.get_scale()
        optimizer.minimize(lambda: 1e4 * problem.loss(), scaler=scaler)
        if scaler.get_scale() == scale:
            break
        assert scaler.get_scale() == scale / 2
        same(everything(optimizer), before)
    assert scale < 2.0**127
    assert optimizer.state_dict()["param_groups"][0]["llqr.step"] == 1
    assert problem.model[1].num_batches_tracked == 1


@pytest.mark.parametrize("probe", ["none", "SAM"])
def test_a_disabled_scaler_is_none(probe):
    problem, optimizer = start(probe)
    plain, without = start(probe)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for way in SCALED_WAYS.values():
        way(optimizer, problem, scaler)
    train(without, plain, len(SCALED_WAYS))
    same(everything(optimizer), everything(without))
    poisoned(problem, {0})
    before = everything(optimizer)["model"]
    with pytest.warns(UserWarning, match="not finite"):
        SCALED_WAYS["minimize"](optimizer, problem, scaler)
    same(everything(optimizer)["model"], before)


def test_perturbed_never_unscales():
    """unscale_ may be called once an update, and that call is the user's."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    scaler = scaler_of()
    scaler.scale(problem.loss()).backward()
    with optimizer.perturbed(scaler):
        scaler.scale(problem.loss()).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    total = torch.cat([p.grad.flatten() for p in problem.model.parameters()]).norm()
    assert abs(total - 1e-3) < 1e-8


def test_before_step_sees_unscaled_gradients():
    problem, plain = mlp(), mlp()
    seen = []
    one = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    two = optimizer_of(plain, perturbation=llqr.SAM(0.3))
    one.minimize(
        problem, scaler=scaler_of(), before_step=lambda: seen.append(gradients(problem.model))
    )
    two.minimize(plain, before_step=lambda: seen.append(gradients(plain.model)))
    same(*seen)


def test_the_displacement_does_not_depend_on_the_scale():
    def displacement(scaler):
        problem = mlp()
        optimizer = optimizer_of(problem, perturbation=llqr.FisherSAM(0.3))
        before = weights(problem.model)
        for i in optimizer.passes(scaler):
            loss = problem.loss()
            (loss if scaler is None else scaler.scale(loss)).backward()
            if i:
                now = weights(problem.model)
        return {n: now[n] - before[n] for n in now}

    same(displacement(scaler_of(2.0**20)), displacement(None))


def test_accumulation_with_a_scaler():
    problem, plain = mlp(), mlp()
    one, two = (optimizer_of(p, perturbation=llqr.SAM(0.3)) for p in (problem, plain))
    scaler = scaler_of()
    for _ in range(3):
        one.minimize([problem.part(0, 6), problem.part(6, 12)], scaler=scaler)
        two.minimize([plain.part(0, 6), plain.part(6, 12)])
    same(everything(one), everything(two))


def test_scaler_and_optimizer_states_travel_together():
    problem, optimizer = start("FriendlySAM")
    scaler = scaler_of(growth_interval=2)
    for _ in range(3):
        SCALED_WAYS["minimize"](optimizer, problem, scaler)
    other, resumed = start("FriendlySAM")
    again = scaler_of(1.0)
    other.model.load_state_dict(problem.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(scaler.state_dict())
    for p, o, s in ((problem, optimizer, scaler), (other, resumed, again)):
        for _ in range(3):
            SCALED_WAYS["minimize"](o, p, s)
    same(everything(resumed), everything(optimizer))
    assert again.get_scale() == scaler.get_scale()


def test_the_scaler_reads_no_special_attribute_of_the_base():
    """Fused bases take the scale themselves; under us the gradients must be unscaled before U."""
    problem, plain = mlp(torch.float32), mlp(torch.float32)
    bases = [
        torch.optim.Adam(p.model.parameters(), lr=0.01, fused=fused)
        for p, fused in ((problem, True), (plain, False))
    ]
    one, two = (
        optimizer_of(p, b, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.3))
        for p, b in zip((problem, plain), bases, strict=True)
    )
    for _ in range(3):
        SCALED_WAYS["passes, step unscales"](one, problem, scaler_of())
        SCALED_WAYS["passes, step unscales"](two, plain, scaler_of())
    for a, b in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_a_scaler_saw_is_forgotten_with_its_gradients():
    """A step that is given up after its passes says nothing of the next one's gradients."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.05))
    scaler = torch.amp.GradScaler("cpu")
    for _ in optimizer.passes(scaler):
        scaler.scale(problem.loss()).backward()
    optimizer.zero_grad()
    problem.loss().backward()
    next(problem.model.parameters()).grad.fill_(torch.nan)
    with pytest.warns(UserWarning, match="without a perturbed pass|not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in problem.model.parameters())
