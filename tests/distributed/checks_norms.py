"""What a refresh sees of batch norm in two processes: each its own batch, or one joined batch."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from replicas import data_parallel, near, one_process, rank, replicas_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llqr
from llqr.curvature.expansions._base import checked_kinds
from tiny import Problem, llqr_of, norm_net, same

TOLERANCE = 1e-11  # float64; sums are taken in another order


def learned(optimizer: llqr.Optimizer) -> dict[str, Tensor]:
    state = optimizer.geometry.state()
    return {f"{n}.{k}": v for n, entries in state.items() for k, v in entries.items()}


def shares() -> list[Problem]:
    whole = norm_net(dropout=0.5)
    whole()  # running statistics of their own
    return [whole, whole.part(0, 3), whole.part(3, 6)]


def geometry(**settings):
    return llqr.LLQR("kfac", ema=0.0, lr=0.05, **settings)


def agree(optimizer, joined):
    near(learned(optimizer), learned(joined), TOLERANCE)
    replicas_equal(optimizer.geometry.state())
    ours, theirs = optimizer.last_report, joined.last_report
    assert ours.products == theirs.products
    assert abs(ours.J_before - theirs.J_before) <= 1e-10 * abs(theirs.J_before)
    assert theirs.change > 0.01


def check_each_process_has_the_statistics_of_its_batch():
    """As one process with two forwards has."""
    for batch_norm in ("batch", "running"):
        whole, *parts = shares()
        joined = one_process(whole, geometry=geometry(batch_norm=batch_norm))
        optimizer, share = data_parallel(shares()[0], geometry=geometry(batch_norm=batch_norm))
        before = copy.deepcopy(share.model.state_dict())
        joined.refresh(parts)
        optimizer.refresh(share)
        same(share.model.state_dict(), before)
        agree(optimizer, joined)


class Checkpointed(nn.Module):
    """Runs the norm again in every product, and so what it sends."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model[3:](checkpoint(self.model[:3], x, use_reentrant=False))


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_synchronised_statistics_are_those_of_the_joined_batch():
    """As one process with the whole batch has; torch's own would need a GPU."""
    for curvature, wrap in (("fisher", None), ("newton", None), ("fisher", Checkpointed)):
        whole, *parts = shares()
        joined = one_process(whole, geometry=geometry(curvature=curvature))
        joined.refresh(whole)
        share = shares()[1 + rank()]
        share.model = synchronised(share.model)
        share.model = share.model if wrap is None else wrap(share.model)
        base = torch.optim.SGD(share.model.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, share.model, geometry=geometry(curvature=curvature))
        before = copy.deepcopy(share.model.state_dict())
        optimizer.refresh(share)
        same(share.model.state_dict(), before)
        norms = [m for m in share.model.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert norms and all("forward" not in vars(m) and m.training for m in norms)
        if wrap is None:
            agree(optimizer, joined)
        else:
            near(dict(zip(learned(joined), learned(optimizer).values(), strict=True)),
                 learned(joined), TOLERANCE)  # fmt: skip
    assert all(checked_kinds.values()), checked_kinds


def vectors(synchronise: bool) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = synchronised(model) if synchronise else model
    rows = slice(0, 1) if rank() == 0 else slice(1, 4)
    return Problem(model, torch.randn(4, 4).double()[rows], torch.tensor([0, 1, 2, 1])[rows])


def check_one_row_in_one_process_leaves_nobody_waiting():
    """One's own statistics are the running ones there; synchronised ones are those of all rows."""
    for synchronise in (False, True):
        problem = vectors(synchronise)
        base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, problem.model, geometry=llqr_of("kfac", ema=0.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = optimizer.refresh(problem)
        told = any("one value per channel" in str(w.message) for w in caught)
        assert told is (rank() == 0 and not synchronise), [str(w.message) for w in caught]
        replicas_equal(optimizer.geometry.state())
        assert report.products > 0
        if synchronise:
            expected = mean_gradient(problem)
            assert abs(report.gradient_norm - expected) <= 1e-11 * expected


def mean_gradient(problem: Problem) -> float:
    """The length of the gradient of (L_0 + L_1) / 2, with the statistics of all rows."""
    parts = [None, None]
    dist.all_gather_object(parts, (problem.x, problem.y))
    model = copy.deepcopy(problem.model)
    model[1] = nn.BatchNorm1d(5).double()
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    rows = nn.functional.cross_entropy(model(x), y, reduction="none")
    loss = (rows[0] + rows[1:].mean()) / 2
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return float(sum(g.square().sum() for g in grads).sqrt())
