"""How many operators a step calls, and how often it reads from the device, beside its passes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import llqr
from llqr._random_state import RandomState
from llqr._vectors import copies_of

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
    "SAM, kfac": (lambda: {"perturbation": llqr.SAM(), "geometry": geometry("kfac")}, 37, 3),
    "SAM, e-kfac": (lambda: {"perturbation": llqr.SAM(), "geometry": geometry("e-kfac")}, 49, 3),
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


def test_numpy_is_asked_for_its_state_only_after_it_drew(monkeypatch):
    numpy = pytest.importorskip("numpy")
    numpy.random.seed(0)
    RandomState()
    calls = []
    for name in ("get_state", "set_state"):
        real = getattr(numpy.random, name)

        def watched(*args, real=real, name=name, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(numpy.random, name, watched)
    RandomState().restore()
    assert calls == []
    for draw in (numpy.random.rand, numpy.random.randn, numpy.random.randn, numpy.random.randn):
        before = RandomState()
        drawn = draw()
        before.restore()
        assert draw() == drawn
    assert set(calls) == {"get_state", "set_state"}


@pytest.mark.parametrize("change", ["replaced", "added", "replaced inside"])
def test_modules_that_changed_are_found(change):
    problem = Problem(2)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM())
    optimizer.minimize(problem)
    new = nn.BatchNorm1d(8, affine=False)
    if change == "replaced":
        problem.model[2] = new
    elif change == "added":
        problem.model.insert(2, new)
    else:
        problem.model[2] = nn.Sequential(nn.ReLU())
        optimizer.minimize(problem)
        problem.model[2][0] = new
    optimizer.minimize(problem)
    assert int(new.num_batches_tracked) == 1  # as the first pass left it


def test_a_displacement_that_is_overridden_is_looked_at():
    class Endless(llqr.SAM):
        def displacement(self, probe):
            return {n: g * float("inf") for n, g in probe.gradients.items()}

    problem = Problem(1)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, problem.model, perturbation=Endless())
    with pytest.raises(RuntimeError, match="Endless gave a displacement that is not finite"):
        optimizer.minimize(problem)


@pytest.mark.parametrize("empty", [False, True])
def test_copies_of_many_tensors(empty):
    tensors = [
        torch.randn(3, 4),
        torch.randn(2, 5, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor(7),
        torch.arange(6).view(2, 3),
        torch.randn(4, dtype=torch.float64),
        torch.full((5,), float("nan")),
    ]
    tensors += [torch.empty(0, 5), torch.empty(3, 0)] if empty else []
    copies = copies_of(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape
        assert torch.equal(copy.nan_to_num(9.0), tensor.nan_to_num(9.0))
        assert not copy.numel() or copy.data_ptr() != tensor.data_ptr()
    alone = torch.randn(4)
    (copy,) = copies_of([alone])
    assert torch.equal(copy, alone) and copy.data_ptr() != alone.data_ptr()
