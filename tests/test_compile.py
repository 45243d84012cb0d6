"""Compiled models: torch.compile around the whole, around parts, and in place."""

import copy

import pytest
import torch
from torch import nn

import llqr
from tiny import (
    WAYS,
    close,
    everything,
    llqr_of,
    natural_of,
    norm_net,
    optimizer_of,
    same,
    train,
    weights,
)

# The compiler reads .grad of what enters a compiled part, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def outer(problem, backend):
    problem.model = torch.compile(problem.model, backend=backend)


def inner(problem, backend):
    for i in (0, 5):
        problem.model[i] = torch.compile(problem.model[i], backend=backend)


def in_place(problem, backend):
    problem.model.compile(backend=backend)


def of_the_function(problem, backend):
    """The loss with the model in it."""
    model, compiled = problem.model, torch.compile(problem.model.forward, backend=backend)

    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x):
            return compiled(x)

    problem.model = Through()


COMPILED = {"outer": outer, "inner": inner, "in place": in_place, "function": of_the_function}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def start(compiled=None, backend="eager", **options):
    problem = norm_net(dropout=0.5)
    if compiled is not None:
        COMPILED[compiled](problem, backend)
    torch.manual_seed(1)
    return problem, optimizer_of(
        problem, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.3), **options
    )


def ends(problem):
    """Weights and buffers by the names they have without a compiler."""
    state = problem.model.state_dict()
    return {n.replace("_orig_mod.", "").removeprefix("module."): v for n, v in state.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_model_trains_as_the_plain_one(compiled, way):
    """The backend "eager" runs the captured graph with torch's own kernels: bit for bit."""
    plain, reference = start()
    train(reference, plain, 4, way)
    problem, optimizer = start(compiled)
    train(optimizer, problem, 4, way)
    same(ends(problem), ends(plain))


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_compiled_backward_trains_as_the_plain_one(compiled):
    """aot_eager compiles the backward too and decomposes operations: equal up to rounding."""
    plain, reference = start()
    train(reference, plain, 4)
    problem, optimizer = start(compiled, "aot_eager")
    train(optimizer, problem, 4)
    close(ends(problem), ends(plain))


def test_a_compiled_model_is_sampled_as_the_plain_one():
    found = []
    for compiled in (None, *COMPILED):
        problem, _ = start(compiled)
        optimizer = optimizer_of(problem, geometry=natural_of(), perturbation=llqr.SAM(0.3))
        torch.manual_seed(2)
        train(optimizer, problem, 4)
        found.append(ends(problem))
    for other in found[1:]:
        same(other, found[0])


def test_moving_the_weights_does_not_compile_again():
    """The probe writes into the same tensors, and a refresh runs eagerly."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    problem, optimizer = start("outer", count)
    train(optimizer, problem, 2)
    before = len(graphs)
    assert before > 0
    train(optimizer, problem, 6)
    assert len(graphs) == before
    assert optimizer.geometry.counters()["refreshes"] == 4


def test_the_base_may_be_built_before_or_after_compiling():
    runs = []
    for after in (True, False):
        problem = norm_net()
        base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        if after:
            outer(problem, "eager")
            base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
            optimizer = optimizer_of(problem, base, geometry=llqr_of("diagonal"))
        else:
            optimizer = optimizer_of(problem, base, geometry=llqr_of("diagonal"))
            outer(problem, "eager")
        train(optimizer, problem, 3)
        runs.append(weights(getattr(problem.model, "_orig_mod", problem.model)))
    same(*runs)


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_checkpoint_goes_from_a_compiled_model_to_a_plain_one(compiled):
    problem, optimizer = start(compiled)
    train(optimizer, problem, 3)
    other, resumed = start()
    other.model.load_state_dict(ends(problem))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = []
    for p, o in ((problem, optimizer), (other, resumed)):
        torch.manual_seed(2)
        train(o, p, 3)
        states.append(ends(p))
    same(*states)
    same(everything(optimizer)["optimizer"], everything(resumed)["optimizer"])


def test_a_compiled_forward_with_its_loss():
    """What is compiled is the whole forward; a refresh runs it eagerly."""
    problem, plain = norm_net(), norm_net()
    one, two = (
        optimizer_of(p, geometry=llqr_of(), perturbation=llqr.SAM(0.1)) for p in (problem, plain)
    )

    @torch.compile(backend="eager")
    def forward():
        z = problem.model(problem.x)
        return nn.functional.cross_entropy(z, problem.y), z

    for _ in range(4):
        one.minimize(forward)
        two.minimize(plain)
    same(problem.model.state_dict(), plain.model.state_dict())
