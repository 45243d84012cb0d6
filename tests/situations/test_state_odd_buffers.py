"""Buffers that are no plain dense tensors: sparse, of inference mode, in scripted modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from tiny import WAYS, close, llqr_of, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
F64 = torch.float64


class Problem:
    def __init__(self, model, x, y):
        self.model, self.x, self.y = model, x, y

    def __call__(self):
        z = self.model(self.x)
        return F.cross_entropy(z, self.y), z

    def backward(self):
        loss, _ = self()
        loss.backward()
        return loss.detach()


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def close_to_plain(problem, plain):
    """A tiny radius is plain training: weights, and buffers whatever their layout."""
    optimizer = llqr.Optimizer(sgd_of(problem.model), problem.model, perturbation=llqr.SAM(1e-9))
    base = sgd_of(plain.model)
    for _ in range(3):
        optimizer.minimize(lambda: problem()[0])
        base.zero_grad()
        plain.backward()
        base.step()
    close(weights(problem.model), weights(plain.model), 1e-7)
    plain_buffers = dict(plain.model.named_buffers())
    for name, buffer in problem.model.named_buffers():
        torch.testing.assert_close(buffer, plain_buffers[name], rtol=0, atol=1e-7)


# -- sparse ----------------------------------------------------------------------------------------


class Graph(nn.Module):
    """The adjacency matrix is a buffer; with ``fades`` each forward in training weakens it."""

    def __init__(self, layout, fades):
        super().__init__()
        adjacency = torch.eye(6, dtype=F64)
        adjacency[0, 1] = adjacency[1, 0] = adjacency[2, 5] = 0.5
        self.register_buffer("adjacency", adjacency.to_sparse(layout=layout))
        self.a, self.b = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 3, dtype=F64)
        self.fades = fades

    def forward(self, x):
        z = self.b((self.adjacency @ self.a(x)).relu())
        z = self.adjacency @ z
        if self.fades == "in place":
            with torch.no_grad():
                values = self.adjacency._values if self.adjacency.is_sparse else None
                (values() if values else self.adjacency.values()).mul_(0.5)
        elif self.fades == "anew":
            self.adjacency = self.adjacency * 0.5
        return z


def graph(layout, fades=None):
    torch.manual_seed(0)
    return Problem(Graph(layout, fades), torch.randn(6, 4, dtype=F64), torch.randint(3, (6,)))


LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_sparse_buffers_in_every_way(way, layout):
    problem = graph(LAYOUTS[layout])
    adjacency = problem.model.adjacency
    optimizer = llqr.Optimizer(
        sgd_of(problem.model),
        problem.model,
        geometry=llqr_of("kfac", every=2),
        perturbation=llqr.SAM(0.1),
    )
    losses = train(optimizer, problem, 6, way)
    assert losses[-1] < losses[0]
    assert problem.model.adjacency is adjacency


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fades", ["in place", "anew"])
def test_sparse_buffers_that_change_do_so_once(fades, layout):
    # The graph saves the matrix whose values change, so that a copy goes into it.
    problem, plain = graph(LAYOUTS[layout]), graph(LAYOUTS[layout])
    for p in (problem, plain):
        model = p.model
        forward = model.forward

        def faded(x, model=model, forward=forward):
            kept, model.adjacency = model.adjacency, model.adjacency.clone()
            z = forward(x)
            model.adjacency = kept
            with torch.no_grad():
                if fades == "anew":
                    model.adjacency = kept * 0.5
                else:
                    (kept._values() if kept.is_sparse else kept.values()).mul_(0.5)
            return z

        model.forward = faded
    close_to_plain(problem, plain)


# -- inference mode --------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A buffer that was computed in inference mode, and with ``moves`` is written to there."""

    def __init__(self, moves):
        super().__init__()
        self.body, self.moves = nn.Linear(4, 3, dtype=F64), moves
        with torch.inference_mode():
            self.register_buffer("shift", torch.rand(3, dtype=F64))

    def forward(self, x):
        z = self.body(x) + self.shift.clone()
        if self.moves:
            with torch.inference_mode():
                self.shift.mul_(0.5)
        return z


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_inference_tensors(way, moves):
    torch.manual_seed(0)
    model = Shifted(moves)
    with torch.inference_mode():
        shift = model.shift.clone()
    problem = Problem(model, torch.randn(6, 4, dtype=F64), torch.randint(3, (6,)))
    optimizer = llqr.Optimizer(
        sgd_of(model), model, geometry=llqr_of("kfac", every=1), perturbation=llqr.SAM(0.1)
    )
    kept = model.shift
    train(optimizer, problem, 2, way)
    assert model.shift is kept
    torch.testing.assert_close(model.shift, shift * (0.25 if moves else 1.0))


# -- TorchScript -----------------------------------------------------------------------------------


def scripted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 4, dtype=F64), torch.randint(3, (16,))
    return Problem(net, x, y), Problem(torch.jit.script(copy.deepcopy(net)), x, y)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is not supported")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_scripted_modules_train_as_plain_ones(way, whole):
    plain, problem = scripted()
    if not whole:  # a scripted part of a plain model
        problem.model = nn.Sequential(problem.model, nn.Identity())
        plain.model = nn.Sequential(plain.model, nn.Identity())
    ends = []
    for p in (plain, problem):
        optimizer = llqr.Optimizer(sgd_of(p.model), p.model, perturbation=llqr.SAM(0.1))
        train(optimizer, p, 4, way)
        ends.append({n: v.detach() for n, v in p.model.state_dict().items()})
    assert list(ends[0]) == list(ends[1])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-12)


# -- others ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_complex_and_boolean_buffers():
    model = nn.Linear(4, 3, dtype=F64)
    table = torch.quantize_per_tensor(torch.rand(5), 0.1, 0, torch.quint8)
    model.register_buffer("table", table)
    model.register_buffer("phase", torch.randn(3, dtype=torch.complex128))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("empty", torch.zeros(0))
    before = {n: b.clone() for n, b in model.named_buffers()}

    def spoil(module, arguments, output):
        module.phase.mul_(2j)
        module.mask.logical_not_()

    model.register_forward_hook(spoil)
    problem = Problem(model, torch.randn(6, 4, dtype=F64), torch.randint(3, (6,)))
    optimizer = llqr.Optimizer(
        sgd_of(model), model, geometry=llqr_of("dense"), perturbation=llqr.SAM(0.1)
    )
    train(optimizer, problem, 1)
    before["phase"] *= 2j
    before["mask"].logical_not_()
    for name, value in before.items():
        now = getattr(model, name)
        assert torch.equal(
            now.dequantize() if now.is_quantized else now,
            value.dequantize() if value.is_quantized else value,
        ), name


def test_a_buffer_that_is_a_view_of_a_weight():
    """Put back with the weights; no order of restoring leaves theta + eps in it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=F64)
    model.register_buffer("first_row", model.weight.detach()[0], persistent=False)
    plain = copy.deepcopy(model)
    x, y = torch.randn(6, 4, dtype=F64), torch.randint(3, (6,))
    problem = Problem(model, x, y)
    optimizer = llqr.Optimizer(sgd_of(model), model, perturbation=llqr.SAM(1e-9))
    base = sgd_of(plain)
    for _ in range(3):
        train(optimizer, problem, 1)
        base.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        base.step()
    close(weights(model), weights(plain), 1e-7)
    assert torch.equal(model.first_row, model.weight[0])
