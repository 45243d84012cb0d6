"""Training a part of a network: frozen parts, low-rank adapters, groups with own options."""

import pytest
import torch
from torch import nn

import llqr
from byhand import sam_step
from tiny import (
    F64,
    STRUCTURES,
    WAYS,
    Problem,
    close,
    everything,
    flat,
    llqr_of,
    norm_net,
    optimizer_of,
    same,
    shaped,
    train,
    weights,
)


class LowRank(nn.Module):
    """y = W x + b + B A x with W and b fixed."""

    def __init__(self, inner, rank):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, inner.in_features, dtype=F64) / 2)
        self.B = nn.Parameter(torch.zeros(inner.out_features, rank, dtype=F64))

    def forward(self, x):
        return self.inner(x) + x @ self.A.mT @ self.B.mT


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRank(nn.Linear(5, 6).to(F64), 2), nn.Tanh(), LowRank(nn.Linear(6, 3).to(F64), 2)
    )
    return Problem(model, torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))


def trainable(problem):
    return [p for p in problem.model.parameters() if p.requires_grad]


def frozen(problem):
    return {
        n: p.detach().clone() for n, p in problem.model.named_parameters() if not p.requires_grad
    }


# -- low-rank adapters -----------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["adapters alone", "all parameters"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_train_as_in_the_hand_written_loop(way, whole):
    """Whether the base holds the adapters alone or the frozen weights too."""
    ours, theirs = adapted(), adapted()
    held = list(ours.model.parameters()) if whole else trainable(ours)
    optimizer = optimizer_of(
        ours, torch.optim.SGD(held, lr=0.3, momentum=0.9), perturbation=llqr.SAM(0.3)
    )
    base = torch.optim.SGD(trainable(theirs), lr=0.3, momentum=0.9)
    before = frozen(ours)
    for _ in range(5):
        train(optimizer, ours, 1, way)
        sam_step(base, theirs.backward, 0.3)
    same(weights(ours.model), weights(theirs.model))
    same(frozen(ours), before)
    assert all(p.grad is None for p in ours.model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_u_of_adapters_is_u_of_a_network_that_has_no_other_parameters(structure, curvature):
    """W and b as buffers: the same refresh, the same steps."""
    ours, theirs = adapted(), adapted()
    for module in theirs.model:
        if isinstance(module, LowRank):
            fixed = module.inner
            for name in ("weight", "bias"):
                value = getattr(fixed, name).detach()
                delattr(fixed, name)
                fixed.register_buffer(name, value)
    ends = []
    for problem in (ours, theirs):
        optimizer = optimizer_of(
            problem,
            torch.optim.AdamW(trainable(problem), lr=0.03),
            geometry=llqr_of(structure, curvature=curvature),
            perturbation=llqr.SAM(0.3),
        )
        losses = train(optimizer, problem, 6)
        assert losses[-1] < losses[0]
        ends.append({n: p.detach() for n, p in problem.model.named_parameters() if p.requires_grad})
    close(*ends)


def test_u_of_adapters_stores_nothing_for_frozen_weights():
    problem = adapted()
    base = torch.optim.SGD(trainable(problem), lr=0.1)
    optimizer = optimizer_of(problem, base, geometry=llqr_of("diagonal"))
    train(optimizer, problem, 2)
    assert set(optimizer.geometry.state()) == {"0.A", "0.B", "2.A", "2.B"}
    assert optimizer.geometry.numel() == sum(p.numel() for p in trainable(problem))


# -- frozen parts ----------------------------------------------------------------------------------


def test_a_frozen_trunk_with_its_statistics_in_evaluation():
    """Fine-tuning of a head: the trunk is frozen and evaluates; nothing of it moves."""
    ours, theirs = norm_net(), norm_net()
    for problem in (ours, theirs):
        problem.model[0].requires_grad_(False)
        problem.model[1].requires_grad_(False).eval()
    optimizer = optimizer_of(
        ours, torch.optim.SGD(trainable(ours), lr=0.1), perturbation=llqr.SAM(0.1)
    )
    base = torch.optim.SGD(trainable(theirs), lr=0.1)
    before = {n: v.clone() for n, v in ours.model[:2].state_dict().items()}
    for _ in range(4):
        train(optimizer, ours, 1)
        sam_step(base, theirs.backward, 0.1)
    same(ours.model.state_dict(), theirs.model.state_dict())
    same(ours.model[:2].state_dict(), before)
    assert not ours.model[1].training and ours.model[0].training


# -- groups ----------------------------------------------------------------------------------------

GROUPS = (
    {"lr": 0.3, "weight_decay": 0.0, "rho": 0.2, "momentum": 0.9},
    {"lr": 0.05, "weight_decay": 0.1, "rho": 0.4, "momentum": 0.0},
    {"lr": 0.1, "weight_decay": 0.01, "rho": 0.0, "momentum": 0.5},
)


def grouped(problem):
    model = problem.model
    sets = [
        model[0].parameters(),
        [model[1].weight, model[5].weight],
        [model[1].bias, model[5].bias],
    ]
    groups = [{"params": list(ps), **options} for ps, options in zip(sets, GROUPS, strict=True)]
    return torch.optim.SGD(groups, lr=1.0)


def still_buffers(problem, base, rho):
    """The hand-written step; the second pass leaves the statistics alone."""
    calls = iter(range(2))

    def backward():
        kept = {n: b.clone() for n, b in problem.model.named_buffers()}
        problem.backward()
        if next(calls):
            for name, buffer in problem.model.named_buffers():
                buffer.copy_(kept[name])

    sam_step(base, backward, rho)


@pytest.mark.parametrize("way", WAYS)
def test_groups_keep_their_own_options(way):
    """lr, weight decay, momentum and rho: one norm over all that is perturbed."""
    ours, theirs = norm_net(), norm_net()
    optimizer = optimizer_of(ours, grouped(ours), perturbation=llqr.SAM(7.0))
    base = grouped(theirs)
    for _ in range(5):
        train(optimizer, ours, 1, way)
        still_buffers(theirs, base, 7.0)
    close(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_groups_with_u_are_base_steps_on_u_g(structure, way):
    """The formula, with U read from geometry.apply: eps by group, then U g~ to the base."""
    ours, theirs = norm_net(), norm_net()
    one = optimizer_of(
        ours,
        grouped(ours),
        geometry=llqr_of(structure, every=100),
        perturbation=llqr.SAM(7.0, norm="euclidean"),
    )
    one.refresh(ours)
    base = grouped(theirs)
    radius = {}
    for group in base.param_groups:
        for p in group["params"]:
            radius[id(p)] = group["rho"]
    for _ in range(4):
        train(one, ours, 1, way)
        named = dict(theirs.model.named_parameters())
        rho = {n: radius[id(p)] for n, p in named.items()}
        g = theirs.gradient()
        statistics = {n: b.clone() for n, b in theirs.model.named_buffers()}
        d = one.geometry.apply({n: v for n, v in g.items() if rho[n] > 0})
        unit = shaped(flat(d) / flat(d).norm(), d)
        with torch.no_grad():
            kept = {n: p.clone() for n, p in named.items()}
            for n in d:
                named[n].add_(rho[n] * unit[n])
        g = one.geometry.apply(theirs.gradient())
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(kept[n])
                p.grad = g[n]
            for n, b in theirs.model.named_buffers():
                b.copy_(statistics[n])
        base.step()
    close(ours.model.state_dict(), theirs.model.state_dict())


def test_a_schedule_moves_the_lr_of_each_group():
    problem = norm_net()
    optimizer = optimizer_of(problem, grouped(problem), perturbation=llqr.SAM(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda e: 0.5**e, lambda e: 1.0, lambda e: 0.0]
    )
    train(optimizer, problem, 1)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.15, 0.05, 0.0]
    before = everything(optimizer)["model"]
    train(optimizer, problem, 1)
    after = everything(optimizer)["model"]
    third = {"1.bias", "5.bias"}
    names = [n for n, _ in problem.model.named_parameters()]
    assert {n for n in names if torch.equal(after[n], before[n])} == third
