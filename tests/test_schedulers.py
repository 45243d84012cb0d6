"""Learning-rate schedulers drive our optimizer as they drive its base."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import llqr
from tiny import WAYS, llqr_of, mlp, optimizer_of, same, sgd, train, train_plainly

SCHEDULERS = {
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.3, total_steps=8),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.01, max_lr=0.3, step_size_up=2),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, total_iters=2), lrs.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


def run(scheduler, step, optimizer):
    rates = []
    for _ in range(6):
        loss = step()
        arguments = (loss,) if isinstance(scheduler, lrs.ReduceLROnPlateau) else ()
        scheduler.step(*arguments)
        rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
    return rates


# SequentialLR of older versions of torch passes it to its own parts.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_same_rates_and_weights_as_on_the_base(name, way):
    """Warnings are errors here: none about the order of step() and scheduler.step()."""
    ours, theirs = mlp(), mlp()
    optimizer = optimizer_of(ours)
    base = sgd(theirs, momentum=0.9)
    rates = run(SCHEDULERS[name](optimizer), lambda: train(optimizer, ours, 1, way)[0], optimizer)
    same(rates, run(SCHEDULERS[name](base), lambda: train_plainly(base, theirs, 1)[0], base))
    assert len({pair for step in rates for pair in step}) > 1
    same(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_on_the_base_works_too(way):
    """It counts the steps of the base, which ours makes one for one."""
    one, two = mlp(), mlp()
    first = optimizer_of(one, geometry=llqr_of(), perturbation=llqr.SAM())
    second = optimizer_of(two, geometry=llqr_of(), perturbation=llqr.SAM())
    on_ours, on_base = (lrs.StepLR(o, 2) for o in (first, second.base))
    for _ in range(5):
        train(first, one, 1, way)
        train(second, two, 1, way)
        on_ours.step()
        on_base.step()
    same(one.model.state_dict(), two.model.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_calls_the_step_that_the_scheduler_patched(way):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM())
    scheduler = lrs.StepLR(optimizer, 1)
    assert not getattr(optimizer, "_opt_called", False)
    train(optimizer, problem, 1, way)
    assert optimizer._opt_called
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_torch_still_warns_of_the_wrong_order():
    problem = mlp()
    optimizer = optimizer_of(problem)
    scheduler = lrs.StepLR(optimizer, 1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        scheduler.step()
    assert ["before `optimizer.step()`" in str(w.message) for w in found] == [True]


def test_a_skipped_step_does_not_make_the_scheduler_warn():
    problem = mlp()
    optimizer = optimizer_of(problem)
    scheduler = lrs.StepLR(optimizer, 1)
    problem.x[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.minimize(problem)
    scheduler.step()


def test_resume_with_the_scheduler():
    def start():
        problem = mlp()
        optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.FriendlySAM())
        return problem, optimizer, lrs.CosineAnnealingLR(optimizer, T_max=8)

    def go(problem, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.minimize(problem)
            scheduler.step()

    whole, broken, fresh = start(), start(), start()
    go(*whole, 7)
    go(*broken, 3)
    for old, new in zip((broken[0].model, *broken[1:]), (fresh[0].model, *fresh[1:]), strict=True):
        new.load_state_dict(old.state_dict())
    go(*fresh, 4)
    same(fresh[0].model.state_dict(), whole[0].model.state_dict())
    assert fresh[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
    assert fresh[1].param_groups is fresh[1].base.param_groups


def test_warmup_from_lr_zero_counts_its_first_step():
    """The first step has lr 0 but gradients: it is a step, with its refresh and its probe."""
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(every=2), perturbation=llqr.SAM())
    scheduler = lrs.LambdaLR(optimizer, lambda t: t / 3)
    steps = []
    optimizer.register_refresh_hook(lambda _, report: steps.append(report.step))
    for _ in range(5):
        optimizer.minimize(problem)
        scheduler.step()
    assert steps == [0, 2, 4]


def test_a_tensor_learning_rate():
    one, two = mlp(), mlp()
    tensor = torch.optim.SGD(one.model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    train(optimizer_of(one, tensor, geometry=llqr_of()), one, 3)
    train(optimizer_of(two, sgd(two, lr=0.1), geometry=llqr_of()), two, 3)
    same(one.model.state_dict(), two.model.state_dict())
