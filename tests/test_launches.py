"""How many operators a step calls, and how often it reads from the device, beside its passes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llqr

#: What only looks at memory in another way, allocates, or marks a range for the profiler.
FREE = {
    *("alias", "as_strided", "detach", "expand", "narrow", "permute", "reshape", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"),
    *("_record_function_enter_new", "_record_function_exit"),
}
READS = ("tolist", "item", "__float__", "__bool__", "__int__")


class Counted(TorchDispatchMode):
    """Counts operators; ``_foreach_add`` and the like are one."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._schema.name.partition("::")[2] not in FREE
        return func(*args, **(kwargs or {}))


class Problem:
    def __init__(self, layers):
        torch.manual_seed(0)
        blocks = [[nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()] for _ in range(layers)]
        self.model = nn.Sequential(*[m for block in blocks for m in block], nn.Linear(8, 3))
        self.x, self.y = torch.randn(16, 8), torch.randint(3, (16,))

    def __call__(self):
        z = self.model(self.x)
        return nn.functional.cross_entropy(z, self.y), z

    def differentiate(self):
        self.model.zero_grad()
        self()[0].backward()


def calls_of(function):
    with Counted() as counted:
        function()
    return counted.calls


def own_calls(layers, options):
    """The calls of a step without those of its passes and of the base's step."""
    problem = Problem(layers)
    base = torch.optim.SGD(problem.model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = llqr.Optimizer(base, problem.model, **options())
    for _ in range(3):
        optimizer.minimize(problem)
    passes = 2 if optimizer.needs_second_pass else 1
    whole = calls_of(lambda: optimizer.minimize(problem))
    return whole - passes * calls_of(problem.differentiate) - calls_of(base.step)


def geometry(structure):
    return llqr.LLQR(structure, every=10**9, steps=2)


METHODS = {
    "nothing": (dict, 6, 1),
    "SAM": (lambda: {"perturbation": llqr.SAM()}, 22, 2),
    "ASAM": (lambda: {"perturbation": llqr.ASAM()}, 27, 3),
    "FisherSAM": (lambda: {"perturbation": llqr.FisherSAM()}, 28, 3),
    "FriendlySAM": (lambda: {"perturbation": llqr.FriendlySAM()}, 28, 3),
    "GSAM": (lambda: {"perturbation": llqr.GSAM()}, 37, 4),
    "WSAM": (lambda: {"perturbation": llqr.WSAM()}, 27, 2),
    "ESAM": (lambda: {"perturbation": llqr.ESAM(beta=1.0)}, 25, 3),
    "MSAM": (lambda: {"perturbation": llqr.MSAM()}, 13, 2),
    "LookSAM": (lambda: {"perturbation": llqr.LookSAM(interval=1)}, 39, 5),
    "SAM, diagonal": (
        lambda: {"perturbation": llqr.SAM(), "geometry": geometry("diagonal")},
        28,
        3,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_calls_do_not_grow_with_the_number_of_parameters(method):
    options, bound, _ = METHODS[method]
    few, many = own_calls(2, options), own_calls(20, options)
    assert few == many
    assert many <= bound


@pytest.mark.parametrize("method", METHODS)
def test_reads_from_the_device(method, monkeypatch):
    options, _, bound = METHODS[method]
    problem = Problem(2)
    base = torch.optim.SGD(problem.model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = llqr.Optimizer(base, problem.model, **options())
    for _ in range(3):
        optimizer.minimize(problem)
    reads = []
    for name in READS:
        real = getattr(torch.Tensor, name)

        def read(self, *args, real=real, name=name):
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    optimizer.minimize(problem)
    assert len(reads) <= bound
