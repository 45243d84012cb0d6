"""Weights, buffers and random numbers come back bit for bit, whatever happens in between."""

import gc

import pytest
import torch
from torch import nn

import llqr
from tiny import (
    WAYS,
    buffers,
    dropout_mlp,
    everything,
    gradients,
    llqr_of,
    mlp,
    norm_net,
    optimizer_of,
    poisoned,
    random_metric,
    same,
    sgd,
    train,
    train_plainly,
    weights,
)

PROBES = {
    "SAM": lambda: llqr.SAM(0.3),
    "ASAM": lambda: llqr.ASAM(2.0),
    "FisherSAM": lambda: llqr.FisherSAM(0.3),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.3),
}


class Stop(Exception):
    pass


def moved(problem, start):
    return any(not torch.equal(p, start[n]) for n, p in problem.model.named_parameters())


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probe", PROBES)
def test_weights_move_in_the_second_pass_and_come_back(probe, dtype):
    problem = mlp(dtype)
    optimizer = optimizer_of(problem, perturbation=PROBES[probe]())
    for step in range(3):
        start, away = weights(problem.model), []
        for i in optimizer.passes():
            away.append(moved(problem, start))
            assert all(p.grad is None for p in problem.model.parameters())
            problem.backward()
            assert i == len(away) - 1
        assert away == [False, True], step
        same(weights(problem.model), start)
        assert all(p.grad is not None for p in problem.model.parameters())
        optimizer.step()


@pytest.mark.parametrize("leave", ["raise", "break", "return", "interrupt"])
@pytest.mark.parametrize("when", [0, 1])
def test_weights_come_back_when_the_body_leaves(when, leave):
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3), geometry=llqr_of("kfac"))
    train(optimizer, problem, 2)
    start, clean = weights(problem.model), []

    def body():
        for i in optimizer.passes():
            problem.backward()
            clean.append(buffers(problem.model))
            if i < when:
                continue
            assert moved(problem, start) is (when == 1)
            if leave == "raise":
                raise Stop
            if leave == "interrupt":
                raise KeyboardInterrupt
            if leave == "return":
                return
            break

    try:
        body()
    except (Stop, KeyboardInterrupt):
        pass
    same(weights(problem.model), start)
    same(buffers(problem.model), clean[0])
    state = everything(optimizer)
    train(optimizer, problem, 2)  # and training goes on
    assert state["optimizer"]["param_groups"][0]["llqr.step"] == 2


@pytest.mark.parametrize("way", ["minimize", "closure", "perturbed"])
@pytest.mark.parametrize("when", [1, 2])
def test_weights_come_back_when_the_forward_raises(when, way):
    """The second call is in the perturbed pass."""
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    train(optimizer, problem, 2)
    state, calls, seen = everything(optimizer), problem.calls, []

    def fail(*_):
        seen.append(moved(problem, state["model"]))
        if problem.calls == calls + when:
            raise Stop

    handle = problem.model[-1].register_forward_pre_hook(fail)
    with pytest.raises(Stop):
        WAYS[way](optimizer, problem)
    handle.remove()
    assert seen == [False, True][:when]
    same(
        weights(problem.model), {n: state["model"][n] for n, _ in problem.model.named_parameters()}
    )
    same(everything(optimizer)["optimizer"], state["optimizer"])
    assert buffers(problem.model)["1.num_batches_tracked"] == 3  # as in the clean pass alone
    train(optimizer, problem, 1, way)


def test_an_iterator_that_is_dropped_brings_the_weights_back():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    start = weights(problem.model)
    passes = optimizer.passes()
    next(passes)
    problem.backward()
    next(passes)
    assert moved(problem, start)
    del passes
    gc.collect()
    same(weights(problem.model), start)


def left_open(optimizer, problem):
    """An iterator in its second pass, held, so that nobody but us can close it."""
    passes = optimizer.passes()
    next(passes)
    problem.backward()
    next(passes)
    problem.backward()
    return passes


@pytest.mark.parametrize("rescue", ["step", "passes", "perturbed"])
def test_a_pass_left_open_is_closed_by_what_comes_next(rescue):
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3), geometry=llqr_of())
    optimizer.refresh(problem)
    start = weights(problem.model)
    passes = left_open(optimizer, problem)
    assert moved(problem, start)
    if rescue == "step":
        optimizer.zero_grad()
        optimizer.step()
    elif rescue == "passes":
        newer = optimizer.passes()
        next(newer)
    else:
        with optimizer.perturbed():
            problem.backward()
    same(weights(problem.model), start)
    assert buffers(problem.model)["1.num_batches_tracked"] == 1  # as in the clean pass alone
    passes.close()
    same(weights(problem.model), start)


@pytest.mark.parametrize("end", ["close", "exhaust", "exit"])
@pytest.mark.parametrize("way", ["passes", "perturbed"])
def test_the_late_end_of_an_old_pass_ends_nothing_newer(way, end):
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    start = weights(problem.model)
    if end == "exit":
        problem.backward()
        old = optimizer.perturbed()
        old.__enter__()
        problem.backward()
    else:
        old = left_open(optimizer, problem)
    if way == "passes":
        newer = optimizer.passes()
        next(newer)
        problem.backward()
        clean = buffers(problem.model)
        next(newer)
    else:
        newer, first = optimizer.perturbed(), norm_net()
        newer.__enter__()
        first.backward()
        clean = buffers(first.model)  # the old pass leaves those of its clean backward
    problem.backward()
    away, dirty, g = weights(problem.model), buffers(problem.model), gradients(problem.model)
    assert moved(problem, start)
    {"close": lambda: old.close(), "exhaust": lambda: list(old), "exit": lambda: leave(old)}[end]()
    same(weights(problem.model), away)
    same(buffers(problem.model), dirty)
    same(gradients(problem.model), g)
    list(newer) if way == "passes" else leave(newer)
    same(weights(problem.model), start)
    same(buffers(problem.model), clean)
    optimizer.step()  # without a warning: the newer pass counts
    assert moved(problem, start)


def leave(context):
    context.__exit__(None, None, None)


def test_going_on_with_an_old_iterator_does_not_move_the_weights_of_a_newer_pass():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    old = optimizer.passes()
    next(old)
    problem.backward()
    newer = optimizer.passes()
    next(newer)
    problem.backward()
    next(newer)
    away = weights(problem.model)
    with pytest.raises(RuntimeError, match="passes: .* after the loop"):
        next(old)
    same(weights(problem.model), away)


def test_a_step_within_the_loop_over_passes():
    """An error where a second pass would follow the update; harmless where there is one pass."""
    problem, plain = mlp(), mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    with (
        pytest.raises(RuntimeError, match="passes: .* after the loop"),
        pytest.warns(UserWarning, match="without a perturbed pass"),
    ):
        for _ in optimizer.passes():
            problem.backward()
            optimizer.step()
    problem = mlp()
    optimizer = optimizer_of(problem)
    for _ in optimizer.passes():
        problem.backward()
        optimizer.step()
    train_plainly(sgd(plain, momentum=0.9), plain, 1)
    same(weights(problem.model), weights(plain.model))


@pytest.mark.parametrize("what", ["refresh", "refresh_if_due", "state_dict", "load_state_dict"])
@pytest.mark.parametrize("way", ["passes", "perturbed"])
def test_a_refresh_or_checkpoint_within_a_perturbed_pass_is_refused(way, what):
    """The pass stays open, and the step is the one that it would have been."""
    problem, plain = norm_net(), norm_net()
    options = {"perturbation": llqr.SAM(0.3), "geometry": llqr_of("kfac", start=1)}
    optimizer = optimizer_of(problem, **options)
    options["geometry"] = llqr_of("kfac", start=1)
    twin = optimizer_of(plain, **options)
    for o, p in ((optimizer, problem), (twin, plain)):
        train(o, p, 2)
    state = optimizer.state_dict()
    arguments = {"refresh": [problem], "refresh_if_due": [problem], "load_state_dict": [state]}

    def body(i):
        problem.backward()
        if i:
            away, seen = weights(problem.model), buffers(problem.model)
            with pytest.raises(RuntimeError, match=rf"(load_)?{what[:7]}.*within a perturbed pass"):
                getattr(optimizer, what)(*arguments.get(what, []))
            same(weights(problem.model), away)
            same(buffers(problem.model), seen)

    optimizer.geometry.history.last = twin.geometry.history.last = 0  # due again
    if way == "passes":
        for i in optimizer.passes():
            body(i)
    else:
        optimizer.zero_grad()
        problem.backward()
        with optimizer.perturbed():
            body(1)
    with pytest.warns(UserWarning, match="refresh of the geometry is due"):
        optimizer.step()
    twin.geometry.history.last = 1
    train(twin, plain, 1, way)
    same(weights(problem.model), weights(plain.model))
    same(buffers(problem.model), buffers(plain.model))


def test_a_refresh_and_a_checkpoint_within_the_clean_pass_are_fine():
    problem, plain = dropout_mlp(), dropout_mlp()
    options = {"perturbation": llqr.SAM(0.3)}
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"), **options)
    twin = optimizer_of(plain, geometry=llqr_of("kfac"), **options)
    torch.manual_seed(5)
    for i in optimizer.passes():
        if i == 0:
            optimizer.refresh_if_due(problem)
            optimizer.state_dict()
        problem.backward()
    optimizer.step()
    torch.manual_seed(5)
    train(twin, plain, 1, "passes")
    same(weights(problem.model), weights(plain.model))


def test_weights_keep_their_identity_and_memory():
    problem = mlp()
    pointers = [(id(p), p.data_ptr()) for p in problem.model.parameters()]
    optimizer = optimizer_of(
        problem, perturbation=llqr.SAM(0.3), geometry=llqr_of("kfac"), graft=True
    )
    train(optimizer, problem, 3)
    assert [(id(p), p.data_ptr()) for p in problem.model.parameters()] == pointers


def test_passes_may_hold_any_code():
    """Two backwards in one body add up, as in torch."""
    one, two = mlp(), mlp()
    a, b = (optimizer_of(p, perturbation=llqr.SAM(0.3)) for p in (one, two))
    for _ in a.passes():
        one.backward(0.5)
        one.backward(0.5)
    a.step()
    train(b, two, 1)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


# -- buffers ---------------------------------------------------------------------------------------


class History(nn.Module):
    """Buffers of every kind: written in place, replaced, of integers, None, not persistent."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", None)
        self.register_buffer("log", torch.zeros(0, dtype=torch.float64), persistent=False)

    def forward(self, z):
        if self.training:
            with torch.no_grad():
                self.sum += z.detach().mean(0)
                self.calls += 1
                self.last = z.detach().clone()
                self.log = torch.cat([self.log, z.detach().mean().reshape(1)])
        return z


class Ring(nn.Module):
    """Buffers that change their size in place, or are expanded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grown", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("one", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("many", self.one.expand(4))
        self.register_buffer("wide", torch.ones(2, 1, 3).expand(2, 5, 3))

    def forward(self, z):
        if self.training:
            with torch.no_grad():
                self.grown.resize_(len(self.grown) + 1)[-1] = z.sum()
                self.one += z.mean()
        return z


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_are_resized_or_expanded_come_back(fails):
    """To those after the clean pass; to those of the start where the step is skipped."""
    problem, alone = mlp(), mlp()
    for p in (problem, alone):
        p.model.append(Ring())
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3), geometry=llqr_of("kfac"))
    if fails:
        poisoned(problem, {2})  # the refresh calls first
        with pytest.warns(UserWarning, match="skipped"):
            train(optimizer, problem, 1)
    else:
        train(optimizer, problem, 1)
        alone.backward()
    same(buffers(problem.model), buffers(alone.model))
    ring = problem.model[-1]
    assert ring.many.data_ptr() == ring.one.data_ptr() and ring.many.stride() == (0,)


def with_history():
    problem = norm_net()
    problem.model.append(History())
    return problem


def all_buffers(model):
    return {
        f"{n}.{k}": None if b is None else b.detach().clone()
        for n, m in model.named_modules()
        for k, b in m._buffers.items()
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("probe", PROBES)
def test_buffers_advance_as_in_the_clean_pass_alone(probe, way):
    problem = with_history()
    optimizer = optimizer_of(
        problem, perturbation=PROBES[probe](), geometry=llqr_of("kfac", every=1)
    )
    for _ in range(2):
        alone = with_history()
        alone.model.load_state_dict(problem.model.state_dict(), strict=False)
        alone.model[-1].log = problem.model[-1].log.clone()
        alone.backward()
        train(optimizer, problem, 1, way)
        same(all_buffers(problem.model), all_buffers(alone.model))
    assert problem.model[1].num_batches_tracked == 2
    assert len(problem.model[-1].log) == 2


@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
def test_buffers_perturbed_advance_as_in_the_second_pass_alone(way):
    """buffers="perturbed": once a step, from the statistics at theta + eps."""
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.5), buffers="perturbed")
    start, alone = problem.model.state_dict(), norm_net()
    alone.model.load_state_dict(start)
    g = alone.gradient()
    alone.model.load_state_dict(start)
    norm = (sum(v.square().sum() for v in g.values()) + 1e-12).sqrt()
    with torch.no_grad():
        for n, p in alone.model.named_parameters():
            p.add_(g[n] * (0.5 / norm))
    alone.backward()
    train(optimizer, problem, 1, way)
    for n, b in buffers(problem.model).items():
        torch.testing.assert_close(b, buffers(alone.model)[n], rtol=0, atol=1e-14)
    assert problem.model[1].num_batches_tracked == 1
    clean = norm_net()
    clean.backward()
    assert not torch.allclose(problem.model[1].running_mean, clean.model[1].running_mean)


@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
def test_one_pass_advances_buffers_as_ever(way):
    problem, plain = norm_net(), norm_net()
    options = {"perturbation": llqr.SAM(0.0), "buffers": "perturbed", "geometry": llqr_of(start=9)}
    train(optimizer_of(problem, **options), problem, 3, way)
    train_plainly(sgd(plain, momentum=0.9), plain, 3)
    same(problem.model.state_dict(), plain.model.state_dict())


def test_accumulation_advances_buffers_once_a_microbatch():
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    parts = [problem.part(0, 2), problem.part(2, 4), problem.part(4, 6)]
    optimizer.minimize(parts)
    alone = norm_net()
    for low in (0, 2, 4):
        alone.part(low, low + 2).backward()
    same(buffers(problem.model), buffers(alone.model))


# -- random numbers --------------------------------------------------------------------------------


def masks(problem, optimizer, way):
    """The dropout masks of each forward of one step, and the generator's state after it."""
    seen = []
    handle = problem.model[1].register_forward_hook(lambda m, i, o: seen.append((o == 0).clone()))
    train(optimizer, problem, 1, way)
    handle.remove()
    return seen


@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
def test_the_second_pass_sees_the_masks_of_the_first(way):
    problem, plain = dropout_mlp(), dropout_mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    base = sgd(plain)
    torch.manual_seed(3)
    pairs = [masks(problem, optimizer, way) for _ in range(3)]
    after = torch.rand(4)
    for first, second in pairs:
        same(first, second)
    assert not torch.equal(pairs[0][0], pairs[1][0])  # but each step its own
    torch.manual_seed(3)
    train_plainly(base, plain, 3)
    same(after, torch.rand(4))  # two passes take the numbers of one


@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
def test_replay_can_be_switched_off(way):
    problem = dropout_mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3), replay_rng=False)
    first, second = masks(problem, optimizer, way)
    assert not torch.equal(first, second)


def test_microbatches_replay_too():
    problem = dropout_mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(0.3))
    seen = []
    problem.model[1].register_forward_hook(lambda m, i, o: seen.append((o == 0).clone()))
    optimizer.minimize([problem.part(0, 6), problem.part(6, 12)])
    same(seen[:2], seen[2:])
    assert not torch.equal(seen[0], seen[1])


def test_a_refresh_takes_no_random_numbers():
    one, two = dropout_mlp(), dropout_mlp()
    torch.manual_seed(4)
    train(optimizer_of(one, geometry=random_metric(one)), one, 3)
    first = torch.rand(3)
    torch.manual_seed(4)
    train(optimizer_of(two, geometry=llqr_of("e-kfac", every=1)), two, 3)
    same(first, torch.rand(3))


def test_gradients_in_the_first_pass_are_cleared_for_the_second():
    problem = mlp()
    problem.backward(7.0)  # left over from before
    optimizer = optimizer_of(problem, sgd(problem), perturbation=llqr.SAM(0.0))
    for _ in optimizer.passes():
        problem.backward()
    same(gradients(problem.model), problem.gradient())


class Aliasing(nn.Module):
    """Its buffer lies in the memory of its weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("flat", self.linear.weight.detach().view(-1), persistent=False)

    def forward(self, x):
        return self.linear(x)


def test_buffers_that_are_views_of_weights_move_with_them():
    model, seen = Aliasing(), []
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, perturbation=llqr.SAM(0.5))
    for _ in optimizer.passes():
        seen.append(model.linear.weight.detach().clone())
        model(torch.ones(1, 2)).square().mean().backward()
    assert torch.linalg.vector_norm(seen[1] - seen[0]) > 0.1
    assert torch.equal(model.linear.weight, seen[0])
