"""The second pass has the loss of the first: it starts from the buffers that the first had."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from tiny import WAYS, buffers, close, same, train, weights

F64 = torch.float64


class Queue(nn.Module):
    """Contrastive: this batch's keys go into the queue after the loss has read it."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 5, dtype=F64)
        self.register_buffer("queue", F.normalize(torch.randn(5, 16, dtype=F64), dim=0))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, a, keys):
        q, i = F.normalize(self.query(a), dim=1), int(self.at)
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ self.queue.clone()], 1) / 0.2
        with torch.no_grad():
            self.queue[:, i : i + len(keys)] = keys.T
            self.at.copy_((self.at + len(keys)) % 16)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


class Recurrent(nn.Module):
    """A state that each forward replaces by a new tensor."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 5, dtype=F64)
        self.register_buffer("state", torch.zeros(1, 5, dtype=F64))

    def forward(self, x, y):
        h = self.cell(torch.cat([x[:, :3], self.state.expand(len(x), -1)], 1)).tanh()
        self.state = h.detach().mean(0, keepdim=True)
        return (h - y).square().mean()


class ThroughData(nn.Module):
    """Vector quantisation as it is often written: the codes move through .data."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5, dtype=F64)
        self.register_buffer("code", torch.ones(5, dtype=F64))

    def forward(self, x, y):
        z = self.body(x)
        loss = (z - self.code).square().mean() + (z - y).square().mean()
        self.code.data.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
        return loss


class Lazy(nn.Module):
    """A buffer that the first forward makes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5, dtype=F64)

    def forward(self, x, y):
        z = self.body(x)
        if not hasattr(self, "scale"):
            self.register_buffer("scale", z.detach().abs().max())
        loss = (z / self.scale - y).square().mean()
        self.scale = 0.9 * self.scale + 0.1
        return loss


MODELS = {m.__name__: m for m in (Queue, Recurrent, ThroughData, Lazy)}


def batch():
    return torch.randn(4, 6, dtype=F64), F.normalize(torch.randn(4, 5, dtype=F64), dim=1)


class Problem:
    """What tiny.train asks for, on one of the models here."""

    def __init__(self, model):
        self.model, self.losses = model, []
        self.batch = batch()

    def __call__(self):
        return self.model(*self.batch)

    def backward(self):
        loss = self()
        loss.backward()
        self.losses.append(loss.detach())
        return loss.detach()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["minimize", "closure", "passes"])
def test_a_tiny_radius_is_plain_training(way, model):
    torch.manual_seed(0)
    problem = Problem(MODELS[model]())
    plain = copy.deepcopy(problem.model)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.5),
        problem.model,
        perturbation=llqr.SAM(1e-9),
    )
    base = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(4):
        problem.batch = batch()
        train(optimizer, problem, 1, way)
        base.zero_grad()
        plain(*problem.batch).backward()
        base.step()
    close(weights(problem.model), weights(plain), 1e-7)
    close(buffers(problem.model), buffers(plain), 1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_both_passes_have_the_same_loss_at_the_same_weights(model):
    torch.manual_seed(0)
    problem = Problem(MODELS[model]())
    groups = [{"params": list(problem.model.parameters()), "rho": 1e-300}]
    optimizer = llqr.Optimizer(
        torch.optim.SGD(groups, lr=0.5), problem.model, perturbation=llqr.SAM(1.0)
    )
    train(optimizer, problem, 2, "passes")
    first, second = problem.losses[2:]
    assert len(problem.losses) == 4 and torch.equal(first, second)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_the_buffers_after_the_step_are_those_of_the_clean_pass(way, model):
    torch.manual_seed(0)
    problem = Problem(MODELS[model]())
    alone = copy.deepcopy(problem.model)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.5),
        problem.model,
        perturbation=llqr.SAM(0.3),
    )
    train(optimizer, problem, 1, way)
    alone(*problem.batch)
    same(buffers(problem.model), buffers(alone))


@pytest.mark.parametrize("leave", ["break", "raise"])
def test_a_second_pass_that_is_cut_off_leaves_the_clean_pass_s_buffers(leave):
    torch.manual_seed(0)
    problem = Problem(Queue())
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.5),
        problem.model,
        perturbation=llqr.SAM(0.3),
    )
    start, clean = buffers(problem.model), None
    try:
        for i in optimizer.passes():
            if i:
                same(buffers(problem.model), start)
            problem.backward()
            if i and leave == "break":
                break
            if i:
                raise KeyError
            clean = buffers(problem.model)
    except KeyError:
        pass
    same(buffers(problem.model), clean)


def test_perturbed_alone_goes_on_from_the_clean_pass_s_buffers():
    """It cannot know those of the start; afterwards the clean pass's are back."""
    torch.manual_seed(0)
    problem = Problem(Queue())
    optimizer = llqr.Optimizer(
        torch.optim.SGD(problem.model.parameters(), lr=0.5),
        problem.model,
        perturbation=llqr.SAM(0.3),
    )
    problem.backward()
    clean = buffers(problem.model)
    with optimizer.perturbed():
        same(buffers(problem.model), clean)
        problem.backward()
    same(buffers(problem.model), clean)


def test_a_graph_of_the_users_that_holds_an_untouched_buffer_stays_valid():
    """What was computed before the passes serves both: nothing wrote to the mask it saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.register_buffer("mask", torch.rand(4, 3))
    x = torch.randn(4, 3)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=llqr.SAM(0.1)
    )
    shift = torch.ones(4, 3, requires_grad=True)
    before = shift * model.mask  # saves the mask
    for _ in optimizer.passes():
        model(x + before).square().mean().backward(retain_graph=True)
    optimizer.step()
    assert shift.grad is not None


def test_a_teacher_inside_the_model_moves_once_and_both_passes_see_the_same():
    """Its parameters are not the base's, and its forward moves them: in place, or through .data."""

    class Student(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how, self.net = how, nn.Linear(6, 5, dtype=F64)
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def forward(self, x, y):
            with torch.no_grad():
                for t, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    if self.how == "in place":
                        t.mul_(0.9).add_(p, alpha=0.1)
                    elif self.how == "through data":
                        t.data.mul_(0.9).add_(p.data, alpha=0.1)
                    else:
                        t.data = 0.9 * t.data + 0.1 * p.data
            return (self.net(x) - self.teacher(x) - y).square().mean()

    for how in ("in place", "through data", "new data"):
        torch.manual_seed(0)
        problem = Problem(Student(how))
        plain = copy.deepcopy(problem.model)
        pointers = [t.data_ptr() for t in problem.model.teacher.parameters()]
        base = torch.optim.SGD(problem.model.net.parameters(), lr=0.5)
        optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(1e-9))
        hand = torch.optim.SGD(plain.net.parameters(), lr=0.5)
        for step in range(4):
            problem.batch = batch()
            train(optimizer, problem, 1, "minimize" if step % 2 else "passes")
            hand.zero_grad()
            plain(*problem.batch).backward()
            hand.step()
        close(weights(problem.model), weights(plain), 1e-7)
        if how != "new data":
            assert pointers == [t.data_ptr() for t in problem.model.teacher.parameters()]
