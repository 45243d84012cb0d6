"""FriendlySAM: the probe leaves out what its memory knows, and the memory is a running mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import llqr
from tiny import (
    F64,
    close,
    flat,
    mlp,
    norm_net,
    optimizer_of,
    poisoned,
    random_metric,
    same,
    train,
    weights,
)

RHO, EPS0 = 0.2, 1e-12


@pytest.mark.parametrize("decay, sigma", [(0.9, 1.0), (0.6, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["metric", "euclidean"])
@pytest.mark.parametrize("start", ["zero", "gradient"])
def test_friendly_sam_over_steps(start, norm, decay, sigma):
    """v = g - sigma m and only then m <- decay m + (1 - decay) g, with raw clean gradients."""
    problem = mlp()
    geometry = random_metric(problem)
    probe = llqr.FriendlySAM(RHO, sigma=sigma, decay=decay, norm=norm, memory_start=start)
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=probe)
    m = torch.zeros(57, dtype=F64)
    for step in range(5):
        g = problem.gradient()
        v = flat(g) - sigma * m
        d = geometry.U @ v
        expected = RHO * d / ((v if norm == "metric" else d) @ d + EPS0).sqrt()
        before, seen = weights(problem.model), []
        for i in optimizer.passes():
            problem.backward()
            if i:
                seen.append(flat(weights(problem.model)) - flat(before))
        optimizer.step()
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
        m = decay * m + (1 - decay) * flat(g)
        if step == 0 and start == "gradient":
            m = flat(g)
        memory = flat({n: e["memory"] for n, e in probe.state().items()})
        torch.testing.assert_close(memory, m, rtol=0, atol=1e-14)


def memory_of(optimizer):
    return {n: e["memory"].clone() for n, e in optimizer.perturbation.state().items()}


@pytest.mark.parametrize("way", ["minimize", "closure", "passes", "perturbed", "plain"])
@pytest.mark.parametrize("rho", [RHO, 0.0, lambda step: RHO * (step % 2)])
@pytest.mark.filterwarnings("ignore:step.. ran without a perturbed pass:UserWarning")
def test_memory_is_the_closed_form(rho, way):
    """m_T = (1 - decay) sum_t decay^(T-1-t) g_t; at rho = 0 too; not at skipped steps."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(rho, decay=0.8, start=2))
    history = []
    for step in range(7):
        skip = step == 3
        if not skip:
            history.append(problem.gradient())
        else:
            forward = problem.model.forward
            poisoned(problem, {0})
        if way == "plain":
            optimizer.zero_grad()
            problem.backward()
            step_ = optimizer.step
        else:

            def step_():
                train(optimizer, problem, 1, way)

        if skip:
            with pytest.warns(UserWarning, match="not finite"):
                step_()
            problem.model.forward = forward
        else:
            step_()
    count = len(history)
    expected = {
        n: sum(0.2 * 0.8 ** (count - 1 - t) * g[n] for t, g in enumerate(history))
        for n in history[0]
    }
    close(memory_of(optimizer), expected)


def test_memory_covers_groups_that_are_not_perturbed():
    problem = mlp()
    first, second = (list(problem.model[i].parameters()) for i in (0, 2))
    base = torch.optim.SGD([{"params": first}, {"params": second, "rho": 0.0}], lr=0.1)
    optimizer = optimizer_of(problem, base, perturbation=llqr.FriendlySAM(RHO, decay=0.9))
    g = problem.gradient()
    train(optimizer, problem, 1)
    close(memory_of(optimizer), {n: 0.1 * v for n, v in g.items()})


def test_memory_of_a_step_that_was_left_is_not_kept():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(RHO))
    train(optimizer, problem, 2)
    before = memory_of(optimizer)
    for i in optimizer.passes():
        problem.backward()
        if i:
            break
    same(memory_of(optimizer), before)
    g = problem.gradient()
    train(optimizer, problem, 1)
    close(memory_of(optimizer), {n: 0.9 * before[n] + 0.1 * g[n] for n in g})


def test_memory_with_clipping_holds_raw_clean_gradients():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.FriendlySAM(RHO, decay=0.5))
    g = problem.gradient()
    optimizer.minimize(
        problem, before_step=lambda: nn.utils.clip_grad_norm_(problem.model.parameters(), 1e-6)
    )
    close(memory_of(optimizer), {n: 0.5 * v for n, v in g.items()})


@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    decay=st.floats(0.0, 0.99),
    sigma=st.floats(0.0, 2.0),
    steps=st.integers(1, 6),
)
def test_friendly_memory_for_any_gradients(seed, decay, sigma, steps):
    probe = llqr.FriendlySAM(0.1, decay=decay, sigma=sigma)
    problem = norm_net()
    named = dict(problem.model.named_parameters())
    probe.bind(named)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(steps):
        g = {n: torch.randn(p.shape, dtype=F64, generator=generator) for n, p in named.items()}
        probe.observe(g)
        probe.commit()
        history.append(g)
    for n in named:
        expected = sum((1 - decay) * decay ** (steps - 1 - t) * g[n] for t, g in enumerate(history))
        torch.testing.assert_close(probe.state()[n]["memory"], expected, rtol=0, atol=1e-12)
