"""SAM's relatives against loops written out from their papers, on flat vectors in float64."""

import copy

import pytest
import torch
from torch import nn

import llqr
from llqr.integrations._micro_batches import MicroBatches
from tiny import (
    F64,
    close,
    displacement,
    everything,
    flat,
    mlp,
    norm_net,
    optimizer_of,
    random_metric,
    same,
    scaler_of,
    sgd,
    shaped,
    through_file,
    train,
    weights,
)

RHO, LR, MU, EPS0 = 0.2, 0.1, 0.9, 1e-12
WAYS = ("minimize", "closure", "passes", "perturbed")


class Loop:
    """SGD with momentum by hand: w <- w - lr m with m <- mu m + U g~, and what probes need."""

    def __init__(self, problem, U, along="metric"):
        self.problem, self.along, self.step = problem, along, 0
        self.w = flat(weights(problem.model))
        self.U = torch.eye(len(self.w), dtype=F64) if U is None else U
        self.m, self.memory = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def gradient(self, eps=0.0):
        like = weights(self.problem.model)
        with torch.no_grad():
            for n, value in shaped(self.w + eps, like).items():
                self.problem.model.get_parameter(n).copy_(value)
        return flat(self.problem.gradient())

    def ascent(self, g):
        d = self.U @ g if self.along == "metric" else g
        return RHO * d / (g @ d + EPS0).sqrt()

    def update(self, g):
        self.m = MU * self.m + self.U @ g
        self.w, self.step = self.w - LR * self.m, self.step + 1


def sam(loop):
    return loop.gradient(loop.ascent(loop.gradient()))


def sam_every_third(loop):
    """From step 1 on; plain steps before and between."""
    return sam(loop) if loop.step in (1, 4, 7) else loop.gradient()


def friendly_sam(loop):
    g = loop.gradient()
    second = loop.gradient(loop.ascent(g - loop.memory))
    loop.memory = 0.9 * loop.memory + 0.1 * g
    return second


def look_sam(loop):
    """Algorithm 1 of the paper with k = 3, alpha = .7; here from step 1 on."""
    g = loop.gradient()
    if loop.step in (1, 4, 7):
        g_s = loop.gradient(loop.ascent(g))
        cosine = g @ g_s / (g.norm() * g_s.norm())
        loop.memory = g_s - g_s.norm() * cosine * g / g.norm()
        return g_s
    if loop.step == 0:
        return g
    return g + 0.7 * g.norm() / loop.memory.norm() * loop.memory


def gsam(loop):
    g = loop.gradient()
    second = loop.gradient(loop.ascent(g))
    unit = second / second.norm()
    return second - 0.4 * (g - (g @ unit) * unit)


def wsam(loop):
    """The gradient of (1 - 2 gamma) / (1 - gamma) L + gamma / (1 - gamma) L_SAM."""
    gamma, g = 0.8, loop.gradient()
    second = loop.gradient(loop.ascent(g))
    return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * second


def esam(loop):
    """SWP of the paper: SAM's displacement on the tensors drawn with probability beta, over beta.

    One number is drawn per tensor, from the seed and the number of the step.
    """
    beta, seed = 0.6, 3
    generator = torch.Generator().manual_seed(seed * 1_000_003 + loop.step)
    like = weights(loop.problem.model)
    uniform = torch.rand(len(like), generator=generator)
    mask = {
        n: torch.full_like(w, float(u < beta))
        for (n, w), u in zip(like.items(), uniform, strict=True)
    }
    return loop.gradient(flat(mask) / beta * loop.ascent(loop.gradient()))


def msam(loop):
    """Algorithm 1 of the paper: the gradient at w - rho v / |v|."""
    return loop.gradient(-RHO * loop.m / (loop.m @ loop.m + EPS0).sqrt())


RULES = {
    "SAM": (sam, lambda **o: llqr.SAM(RHO, **o)),
    "SAM, interval": (sam_every_third, lambda **o: llqr.SAM(RHO, interval=3, start=1, **o)),
    "FriendlySAM": (friendly_sam, lambda **o: llqr.FriendlySAM(RHO, **o)),
    "LookSAM": (look_sam, lambda **o: llqr.LookSAM(RHO, interval=3, start=1, **o)),
    "GSAM": (gsam, lambda **o: llqr.GSAM(RHO, **o)),
    "WSAM": (wsam, lambda **o: llqr.WSAM(RHO, gamma=0.8, **o)),
    "ESAM": (esam, lambda **o: llqr.ESAM(RHO, beta=0.6, seed=3, **o)),
    "MSAM": (msam, lambda **o: llqr.MSAM(RHO)),
}


def compare(rule, U, along="metric", way="minimize", steps=9):
    problem, reference = mlp(), mlp()
    geometry = random_metric(problem) if U else None
    optimizer = optimizer_of(
        problem, sgd(problem, lr=LR, momentum=MU), geometry=geometry,
        perturbation=RULES[rule][1](along=along),
    )  # fmt: skip
    loop = Loop(reference, geometry.U if U else None, along)
    for _ in range(steps):
        loop.update(RULES[rule][0](loop))
    train(optimizer, problem, steps, way)
    assert optimizer._progress.step == steps
    torch.testing.assert_close(flat(weights(problem.model)), loop.w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_they_are_their_papers(rule, way):
    compare(rule, U=False, way=way)


@pytest.mark.parametrize("along", ["metric", "gradient"])
@pytest.mark.parametrize("rule", RULES)
def test_they_go_through_the_metric(rule, along):
    """Their probes along U g or g, their steps through U."""
    compare(rule, U=True, along=along)


@pytest.mark.parametrize("norm", ["metric", "euclidean", "layer-metric", "layer-euclidean"])
def test_along_the_gradient_every_norm_is_that_without_a_metric(norm):
    eps = []
    for geometry, along in ((None, "metric"), ("random", "gradient")):
        problem = mlp()
        optimizer = optimizer_of(
            problem,
            geometry=geometry and random_metric(problem),
            perturbation=llqr.SAM(RHO, norm=norm, along=along),
        )
        eps.append(displacement(optimizer, problem))
    same(*eps)


# -- interval --------------------------------------------------------------------------------------

TABLE = {
    "SAM": llqr.SAM, "ASAM": llqr.ASAM, "FisherSAM": llqr.FisherSAM, "GSAM": llqr.GSAM,
    "FriendlySAM": llqr.FriendlySAM, "LookSAM": llqr.LookSAM, "WSAM": llqr.WSAM,
    "ESAM": llqr.ESAM, "MSAM": llqr.MSAM,
}  # fmt: skip


@pytest.mark.parametrize("probe", TABLE)
def test_an_interval_counts_the_steps_that_count_from_the_start(probe):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=TABLE[probe](RHO, interval=3, start=2))
    moved = []
    for step in range(9):
        start, away = weights(problem.model), False
        needed, calls = optimizer.needs_second_pass, problem.calls
        for _ in optimizer.passes():
            away |= not torch.equal(flat(weights(problem.model)), flat(start))
            problem.backward(float("nan") if step == 5 else 1.0)
        assert needed == (problem.calls == calls + 2)
        moved.append(away)
        if step == 5:
            with pytest.warns(UserWarning, match="not finite"):
                optimizer.step()
        else:
            optimizer.step()
    # steps 2, 5 and, since the one at 5 did not count and ran unperturbed, again 5 and 8
    first = [False, False, True, False, False]
    if probe == "MSAM":  # which knows its displacement before the gradient
        assert moved == [*first, True, True, False, False]
    else:
        assert moved == [*first, False, True, False, False]


def test_steps_between_probes_copy_nothing(monkeypatch):
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.SAM(RHO, interval=2))
    train(optimizer, problem, 1)
    for name in ("clone", "_foreach_add_"):
        owner = torch.Tensor if name == "clone" else torch
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("something was copied"))
    for _ in optimizer.passes():
        problem.backward()


@pytest.mark.parametrize("probe", TABLE)
def test_a_run_resumes_between_probes_bitwise(probe):
    def start():
        problem = norm_net(torch.float32)
        base = torch.optim.AdamW(problem.model.parameters(), lr=0.01)
        return problem, optimizer_of(problem, base, perturbation=TABLE[probe](RHO, interval=3))

    (problem, optimizer), (other, resumed) = start(), start()
    train(optimizer, problem, 5)
    other.model.load_state_dict(problem.model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    train(optimizer, problem, 4)
    train(resumed, other, 4)
    same(everything(resumed), everything(optimizer))


@pytest.mark.parametrize("probe", TABLE)
def test_a_scaler_changes_nothing(probe):
    """Powers of two scale exactly: passes, the memory and the adjustment see unscaled gradients."""
    ends = []
    for scaler in (None, scaler_of()):
        problem = mlp(torch.float32)
        optimizer = optimizer_of(problem, perturbation=TABLE[probe](RHO, interval=2))
        for _ in range(5):
            optimizer.minimize(problem, scaler=scaler)
        ends.append(everything(optimizer))
    same(*ends)


def test_perturbed_between_probes_is_a_plain_step():
    """A loop that does not ask needs_second_pass wastes a pass, and nothing else."""
    problem, other = mlp(), mlp()
    lazy, asking = (
        optimizer_of(p, perturbation=llqr.LookSAM(RHO, interval=3)) for p in (problem, other)
    )
    for _ in range(5):
        lazy.zero_grad()
        problem.backward()
        with lazy.perturbed():
            problem.backward()
        lazy.step()
    train(asking, other, 5)
    same(everything(lazy), everything(asking))


@pytest.mark.parametrize("probe", ["GSAM", "WSAM", "LookSAM"])
def test_a_parameter_that_one_pass_leaves_out(probe):
    """Its gradient there is zero."""
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=TABLE[probe](RHO, interval=1))
    for way in ((1, 0), (0, 1)):
        for i in optimizer.passes():
            bias = problem.model[2].bias
            bias.requires_grad_(bool(way[i]))
            problem.backward()
        problem.model[2].bias.requires_grad_(True)
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in problem.model.parameters())


# -- LookSAM ---------------------------------------------------------------------------------------


def test_look_sam_keeps_no_rounding_for_a_direction():
    """Unperturbed second passes tell nothing: steps between are then plain ones."""
    problem, plain = mlp(torch.float32), mlp(torch.float32)
    probe = llqr.LookSAM(1e-30, interval=2)
    train(optimizer_of(problem, perturbation=probe), problem, 4)
    train(optimizer_of(plain), plain, 4)
    assert not any(bool(e["direction"].any()) for e in probe.state().values())
    same(weights(problem.model), weights(plain.model))


def test_look_sam_forgets_a_probe_whose_step_did_not_count():
    problem = mlp()
    probe = llqr.LookSAM(RHO, interval=2)
    optimizer = optimizer_of(problem, perturbation=probe)
    train(optimizer, problem, 2)
    before = copy.deepcopy(probe.state())
    for i in optimizer.passes():
        problem.backward(float("nan") if i else 1.0)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    problem.backward()
    with pytest.warns(UserWarning, match="without a perturbed pass"):
        optimizer.step()
    same(probe.state(), before)


def test_look_sam_is_plain_where_rho_is_0():
    problem, plain = mlp(), mlp()
    rho = lambda step: RHO if step == 0 else 0.0  # noqa: E731
    optimizer = optimizer_of(problem, perturbation=llqr.LookSAM(rho, interval=2))
    train(optimizer, problem, 1)
    plain.model.load_state_dict(problem.model.state_dict())
    base = optimizer_of(plain)
    base.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    train(optimizer, problem, 3)
    train(base, plain, 3)
    same(weights(problem.model), weights(plain.model))


def test_look_sam_leaves_p_grad_as_the_backward_pass_computed_it():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.LookSAM(RHO, interval=2))
    train(optimizer, problem, 1)
    g = problem.gradient()
    train(optimizer, problem, 1)
    close({n: p.grad for n, p in problem.model.named_parameters()}, g, 1e-15)


# -- MSAM ------------------------------------------------------------------------------------------


def test_msam_perturbs_along_adams_mean():
    """As the authors' AdamW: the gradient at w - rho m / |m|, with m without its correction."""
    problem, reference = mlp(), mlp()
    base = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    train(optimizer_of(problem, base, perturbation=llqr.MSAM(RHO)), problem, 6)
    loop = Loop(reference, None)
    m = v = torch.zeros_like(loop.w)
    for t in range(1, 7):
        g = loop.gradient(-RHO * m / (m @ m + EPS0).sqrt())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        loop.w = loop.w - 0.01 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(flat(weights(problem.model)), loop.w, rtol=0, atol=1e-11)


def test_msam_runs_one_pass_and_its_buffers_advance_once():
    problem = norm_net()
    optimizer = optimizer_of(problem, perturbation=llqr.MSAM(RHO))
    for way in WAYS:
        calls, seen = problem.calls, int(problem.model[1].num_batches_tracked)
        train(optimizer, problem, 2, way)
        assert problem.calls == calls + 2
        assert problem.model[1].num_batches_tracked == seen + 2


@pytest.mark.parametrize(
    "base, why",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "SGD keeps no momentum"),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), "RMSprop keeps no momentum"),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), "Adagrad keeps no momentum"),
    ],
)
def test_msam_refuses_a_base_without_momentum(base, why):
    problem = mlp()
    with pytest.raises(ValueError, match=why):
        optimizer_of(problem, base(problem.model.parameters()), perturbation=llqr.MSAM())


class Odd(torch.optim.SGD):
    """Keeps its momentum under a name of its own."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["velocity"] = state.pop("momentum_buffer")


def test_msam_refuses_a_momentum_that_it_does_not_find():
    problem = mlp()
    base = Odd(problem.model.parameters(), lr=0.1, momentum=0.9)
    optimizer = optimizer_of(problem, base, perturbation=llqr.MSAM(RHO))
    train(optimizer, problem, 1)
    with pytest.raises(ValueError, match="momentum_buffer, exp_avg"):
        train(optimizer, problem, 1)


def test_msam_brings_the_weights_back_when_the_body_raises():
    problem = mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.MSAM(RHO))
    train(optimizer, problem, 2)
    before = weights(problem.model)
    with pytest.raises(KeyError):
        for _ in optimizer.passes():
            assert not torch.equal(flat(weights(problem.model)), flat(before))
            with pytest.raises(RuntimeError, match="within a perturbed pass"):
                optimizer.state_dict()
            raise KeyError
    same(weights(problem.model), before)
    train(optimizer, problem, 1)


def test_msam_in_a_plain_loop_is_the_base_and_says_so():
    problem, plain = mlp(), mlp()
    optimizer, base = optimizer_of(problem, perturbation=llqr.MSAM(RHO)), sgd(plain, momentum=MU)
    with pytest.warns(UserWarning, match="without a perturbed pass"):
        for o, p in ((optimizer, problem), (base, plain)) * 3:
            o.zero_grad()
            p.backward()
            o.step()
    same(weights(problem.model), weights(plain.model))


def test_msam_where_a_framework_has_run_a_pass_at_theta():
    """The step is the same; it costs a second pass."""
    problem, other = mlp(), mlp()
    ours, framework = (optimizer_of(p, perturbation=llqr.MSAM(RHO)) for p in (problem, other))
    batches = MicroBatches()
    for _ in range(4):
        framework.zero_grad()
        batches.start(framework, other.backward, other)
        with batches.clean_backward():
            other.backward()
        batches.finish(framework)
        framework.step()
    train(ours, problem, 4)
    same(weights(other.model), weights(problem.model))


# -- ESAM ------------------------------------------------------------------------------------------


def drawn(eps, sam):
    """Which tensors are perturbed; each is SAM's over beta, or not moved."""
    found = {n: bool(e.any()) for n, e in eps.items()}
    close({n: eps[n] for n in eps if found[n]}, {n: sam[n] / 0.6 for n in eps if found[n]}, 1e-12)
    return found


def test_esam_perturbs_a_random_part_scaled_up():
    problem, other = mlp(), mlp()
    optimizer = optimizer_of(problem, perturbation=llqr.ESAM(RHO, beta=0.6, seed=3))
    choices = []
    for _ in range(80):
        other.model.load_state_dict(problem.model.state_dict())
        whole = displacement(optimizer_of(other, perturbation=llqr.SAM(RHO)), other)
        choices.append(drawn(displacement(optimizer, problem), whole))
        optimizer._progress.step += 1
    shares = [sum(c[n] for c in choices) / 80 for n in choices[0]]
    assert all(abs(share - 0.6) < 0.17 for share in shares), shares  # three sigma
    assert len({tuple(c.values()) for c in choices}) > 10
    with_beta_1 = optimizer_of(problem, perturbation=llqr.ESAM(RHO, beta=1))
    same(displacement(with_beta_1, problem),
         displacement(optimizer_of(problem, perturbation=llqr.SAM(RHO)), problem))  # fmt: skip


def test_esam_draws_by_its_seed_alone():
    ends = {}
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        problem = mlp()
        torch.manual_seed(noise)
        train(optimizer_of(problem, perturbation=llqr.ESAM(RHO, seed=seed)), problem, 4)
        ends[seed, noise] = weights(problem.model)
    same(ends[0, 0], ends[0, 1])
    assert not torch.equal(flat(ends[0, 0]), flat(ends[1, 0]))


# -- SAM-ON ----------------------------------------------------------------------------------------


def test_sam_on_the_norm_layers_only_takes_a_line_of_groups():
    """M. Mueller et al., 2023: eps = rho g_N / |g_N| on the norm layers, nothing elsewhere."""
    problem = norm_net()
    norm = [p for m in problem.model.modules() if isinstance(m, nn.BatchNorm2d)
            for p in m.parameters()]  # fmt: skip
    rest = [p for p in problem.model.parameters() if not any(p is q for q in norm)]
    base = torch.optim.SGD([{"params": norm}, {"params": rest, "rho": 0.0}], lr=0.1)
    eps = displacement(optimizer_of(problem, base, perturbation=llqr.SAM(RHO)), problem)
    g = problem.gradient()
    length = (EPS0 + sum(float(g[n].square().sum()) for n in ("1.weight", "1.bias"))) ** 0.5
    close(eps, {n: g[n] * (RHO / length if n.startswith("1.") else 0.0) for n in g})
