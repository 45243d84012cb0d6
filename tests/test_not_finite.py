"""Gradients that are not finite reach nothing: weights, buffers, momentum, counters, memory, U."""

import warnings

import pytest
import torch

import llqr
from tiny import (
    everything,
    gradients,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    poisoned,
    random_metric,
    same,
    train,
)

NAN, INF = float("nan"), float("inf")
PROBES = {
    "none": lambda: None,
    "SAM": lambda: llqr.SAM(0.3),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.3),
    "SAM(0)": lambda: llqr.SAM(0.0),
}


def start(probe, geometry="kfac"):
    problem = norm_net()
    optimizer = optimizer_of(
        problem,
        torch.optim.Adam(problem.model.parameters(), lr=0.01),
        perturbation=PROBES[probe](),
        geometry=geometry and llqr_of(geometry, every=3),
    )
    train(optimizer, problem, 2)
    return problem, optimizer


def skipped(state, count):
    """The state with so many skipped steps counted, and nothing else changed."""
    for group in state["optimizer"]["param_groups"]:
        group["llqr.skipped_steps"] += count
    return state


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
@pytest.mark.parametrize("probe, when", [(p, 0) for p in PROBES] + [("SAM", 1), ("FriendlySAM", 1)])
def test_a_skipped_step_leaves_all_as_it_was(probe, when, way, value):
    """Buffers too: the skipped step restores those of its start."""
    problem, optimizer = start(probe)
    before = everything(optimizer)
    poisoned(problem, {when}, value)
    with pytest.warns(UserWarning, match="not finite") as found:
        train(optimizer, problem, 1, way)
    assert len(found) == 1
    assert optimizer.skipped_steps == 1
    same(everything(optimizer), skipped(before, 1))


@pytest.mark.parametrize("probe, when", [("none", 0), ("SAM", 0), ("SAM", 1), ("FriendlySAM", 1)])
def test_a_skipped_step_in_perturbed(probe, when):
    """perturbed() knows the buffers on entry alone: those after the user's own clean backward."""
    problem, optimizer = start(probe)
    before = everything(optimizer)
    clean = norm_net()
    clean.model.load_state_dict(before["model"])
    clean.backward()
    poisoned(problem, {when})
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1, "perturbed")
    after, names = everything(optimizer), [n for n, _ in problem.model.named_parameters()]
    same(after["optimizer"], skipped(before, 1)["optimizer"])
    for name, value in after["model"].items():
        wanted = before if name in names else {"model": clean.model.state_dict()}
        same(value, wanted["model"][name], name)


@pytest.mark.parametrize("probe", PROBES)
def test_training_goes_on_as_if_the_step_had_not_been(probe):
    problem, optimizer = start(probe)
    other, undisturbed = start(probe)
    poisoned(problem, {0})
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1)
    train(optimizer, problem, 4)
    train(undisturbed, other, 4)
    same(everything(optimizer), skipped(everything(undisturbed), 1))


def test_the_warning_comes_once():
    problem, optimizer = start("SAM")
    poisoned(problem, set(range(100)))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(optimizer, problem, 4)
    assert len(found) == 1
    assert optimizer.skipped_steps == 4


@pytest.mark.parametrize("probe", ["none", "SAM"])
def test_nan_inputs_do_not_poison_the_statistics(probe):
    """A NaN in a batch makes BatchNorm's running statistics NaN: they are put back."""
    problem, optimizer = start(probe)
    before = everything(optimizer)
    x = problem.x
    problem.x = x.clone()
    problem.x[0, 0, 0, 0] = NAN
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1)
    same(everything(optimizer), skipped(before, 1))
    problem.x = x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, problem, 3)
    assert optimizer.last_report.accepted


@pytest.mark.parametrize("way", ["passes", "perturbed"])
def test_after_a_bad_clean_pass_the_body_runs_unperturbed_and_grad_leaves_as_nan(way):
    problem, optimizer = start("SAM")
    before = everything(optimizer)["model"]
    names = [n for n, _ in problem.model.named_parameters()]
    poisoned(problem, {0})
    bodies = 0

    def second():
        nonlocal bodies
        bodies += 1
        same({n: problem.model.state_dict()[n] for n in names}, {n: before[n] for n in names})
        problem.backward()
        assert all(bool(g.isfinite().all()) for g in gradients(problem.model).values())

    if way == "passes":
        for i in optimizer.passes():
            second() if i else problem.backward()
    else:
        problem.backward()
        with optimizer.perturbed():
            second()
    assert bodies == 1
    assert all(bool(g.isnan().all()) for g in gradients(problem.model).values())


@pytest.mark.parametrize("probe", ["none", "SAM"])
def test_grad_after_a_skipped_step_is_not_finite(probe):
    problem, optimizer = start(probe)
    poisoned(problem, {0})
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1)
    assert any(not bool(g.isfinite().all()) for g in gradients(problem.model).values())


def test_a_bad_gradient_that_the_probe_does_not_use_skips_too():
    problem = mlp()
    first, second = list(problem.model[0].parameters()), list(problem.model[2].parameters())
    base = torch.optim.SGD([{"params": first}, {"params": second, "rho": 0.0}], lr=0.1)
    optimizer = optimizer_of(problem, base, perturbation=llqr.SAM(0.1))
    before = everything(optimizer)
    poisoned(problem, {0})
    with pytest.warns(UserWarning, match="not finite"):
        train(optimizer, problem, 1)
    same(everything(optimizer), skipped(before, 1))


def test_a_plain_step_with_bad_gradients_is_skipped():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=random_metric(problem))
    train(optimizer, problem, 1)
    before = everything(optimizer)
    problem.backward()
    problem.model[0].weight.grad[0, 0] = INF
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    same(everything(optimizer), skipped(before, 1))


@pytest.mark.parametrize("way, said", [("passes", "weights, buffers"), ("perturbed", "as the")])
def test_the_warning_says_which_buffers_a_skipped_step_leaves(way, said):
    """Only passes() knows those of the start; they are BatchNorm's statistics here."""
    problem, optimizer = start("SAM")
    before = everything(optimizer)["model"]
    poisoned(problem, {0})
    with pytest.warns(UserWarning, match=said):
        train(optimizer, problem, 1, way)
    after = problem.model.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"]) is (way == "passes")
    for n, _ in problem.model.named_parameters():
        same(after[n], before[n])


@pytest.mark.parametrize("when", [0, 1])
def test_breaking_out_at_a_bad_loss_and_stepping_skips(when):
    problem, optimizer = start("SAM")
    before = everything(optimizer)
    poisoned(problem, {when})
    for i in optimizer.passes():
        problem.backward()
        if i == when:
            break
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    same(everything(optimizer), skipped(before, 1))


def test_nan_in_the_forward_of_a_refresh_is_refused():
    problem, optimizer = start("none", "kfac")
    U = {n: {k: v.clone() for k, v in e.items()} for n, e in optimizer.geometry.state().items()}
    before = everything(optimizer)["model"]
    bad = problem.part(0, 6)
    bad.x = bad.x.clone()
    bad.x[0] = NAN
    with pytest.warns(UserWarning, match="refused"):
        report = optimizer.refresh(bad)
    assert not report.accepted and "finite" in report.reason
    same(optimizer.geometry.state(), U)
    same(everything(optimizer)["model"], before)
    assert optimizer.geometry.counters()["refused"] == 1
    assert not optimizer.refresh_due  # a refused refresh counts as done
    assert optimizer.refresh(problem).accepted


def test_too_many_refusals_raise_and_explain():
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(every=1, max_failures=2))
    bad = problem.part(0, 6)
    bad.x = bad.x * NAN
    before = everything(optimizer)["model"]
    with pytest.warns(UserWarning, match="refused"):
        optimizer.refresh(bad)
    optimizer.refresh(bad)
    with pytest.raises(llqr.RefreshError, match="max_failures"):
        optimizer.refresh(bad)
    same(everything(optimizer)["model"], before)
    assert optimizer.geometry.spectrum() == {"0": (1.0, 1.0), "2": (1.0, 1.0)}
    fresh = optimizer_of(problem, geometry=llqr_of(every=1, max_failures=2))
    with pytest.warns(UserWarning, match="refused"):
        fresh.refresh(bad)
    assert fresh.refresh(problem).accepted
    fresh.refresh(bad)
    fresh.refresh(bad)  # two in a row again: the count started anew after a good one
    assert fresh.geometry.counters() == {
        "refreshes": 4,
        "refused": 3,
        "failures": 2,
        "saturated": 0,
        "last": 0,
    }


class Averaging(llqr.SAM):
    """Averages what it is shown at once, whether the step counts or not."""

    def __init__(self):
        super().__init__(0.1)
        self.means = {}

    def observe(self, gradients):
        for name, g in gradients.items():
            self.means[name] = 0.5 * self.means.get(name, 0) + g


class Clamping(llqr.LLQR):
    """Hides an infinity from the norm of U g."""

    def apply(self, gradients):
        return {n: x.nan_to_num().clamp(-1, 1) for n, x in super().apply(gradients).items()}


@pytest.mark.parametrize(
    "perturbation, geometry",
    [
        (Averaging, lambda: None),
        (lambda: llqr.FriendlySAM(0.1, norm="euclidean"), lambda: Clamping("diagonal", every=99)),
    ],
)
def test_nothing_learns_from_a_first_pass_that_is_not_finite(perturbation, geometry):
    """Neither an observe() of the user's own nor the memory behind a metric of the user's own."""
    torch.manual_seed(0)
    model, passes = torch.nn.Linear(2, 1), []
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=geometry(),
        perturbation=perturbation(),
    )

    def forward(poison=None):
        passes.append(poison)
        z = model(torch.ones(3, 2))
        loss = z.square().mean()
        first = poison is not None and passes.count(poison) == 1
        return (loss + model.weight.sum() * poison if first else loss), z

    optimizer.minimize(forward)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.minimize(lambda: forward(INF))
    learned = getattr(optimizer.perturbation, "means", optimizer.perturbation.state())
    held = [x for v in learned.values() for x in (v.values() if isinstance(v, dict) else [v])]
    assert held and all(bool(x.isfinite().all()) for x in held)
    assert optimizer.skipped_steps == 1
