"""How many operators a step calls, and how often it reads from the device, beside its passes."""

import random

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
    "nothing": (dict, 5),
    "SAM": (lambda: {"perturbation": llqr.SAM()}, 18),
    "ASAM": (lambda: {"perturbation": llqr.ASAM()}, 22),
    "FisherSAM": (lambda: {"perturbation": llqr.FisherSAM()}, 23),
    "FriendlySAM": (lambda: {"perturbation": llqr.FriendlySAM()}, 23),
    "GSAM": (lambda: {"perturbation": llqr.GSAM()}, 33),
    "WSAM": (lambda: {"perturbation": llqr.WSAM()}, 23),
    "ESAM": (lambda: {"perturbation": llqr.ESAM(beta=1.0)}, 19),
    "MSAM": (lambda: {"perturbation": llqr.MSAM()}, 12),
    "LookSAM": (lambda: {"perturbation": llqr.LookSAM(interval=1)}, 36),
    "SAM, diagonal": (
        lambda: {"perturbation": llqr.SAM(), "geometry": geometry("diagonal")},
        22,
    ),
    "SAM, kfac": (lambda: {"perturbation": llqr.SAM(), "geometry": geometry("kfac")}, 37),
    "SAM, e-kfac": (lambda: {"perturbation": llqr.SAM(), "geometry": geometry("e-kfac")}, 49),
}
#: ESAM draws its choice on the host, and reads it there.
ON_THE_HOST = {"ESAM": 1}


@pytest.mark.parametrize("method", METHODS)
def test_calls_do_not_grow_with_the_number_of_parameters(method):
    options, bound = METHODS[method]
    few, many = own_calls(2, options), own_calls(20, options)
    assert few == many
    assert many <= bound


def test_cut_blocks_are_gathered_in_one_call_and_joined_in_one_per_row_of_blocks():
    model = nn.Linear(12, 12, bias=False)  # 3 x 3 blocks
    metric = llqr.LLQR("kfac", block_size=4)
    metric.bind(model)
    products = 2
    assert calls_of(lambda: metric.apply({"weight": torch.randn(12, 12)})) - 1 == 1 + products + 3


def trained(method, **more):
    """An optimizer and its problem after three steps."""
    problem = Problem(2)
    base = torch.optim.SGD(problem.model.parameters(), lr=1e-3, momentum=0.9)
    optimizer = llqr.Optimizer(base, problem.model, **METHODS[method][0](), **more)
    for _ in range(3):
        optimizer.minimize(problem)
    return optimizer, problem


def reads_of_a_step(optimizer, problem, monkeypatch):
    reads = []
    for name in READS:
        real = getattr(torch.Tensor, name)

        def read(self, *args, real=real, name=name):
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    optimizer.minimize(problem)
    return len(reads)


@pytest.fixture
def accelerator(monkeypatch):
    """Tensors of the CPU count as those of a device that must be waited for."""
    for module in ("_probing", "_vectors"):
        monkeypatch.setattr(f"llqr.{module}.reads_are_free", lambda devices: False)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_once_from_the_device(method, monkeypatch, accelerator):
    bound = 1 + ON_THE_HOST.get(method, 0)
    assert reads_of_a_step(*trained(method), monkeypatch) == bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [2, 20])
def test_launches_on_an_accelerator(method, layers, accelerator):
    """The goals: one call is one launch, or two where torch starts it for 64 tensors at a time."""
    bound = {"nothing": 15, "SAM": 60}.get(method, 90)
    assert own_calls(layers, METHODS[method][0]) <= bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("looks", [True, False])
def test_numbers_that_are_not_read_give_the_same_steps(method, looks, request):
    expected, _ = trained(method)
    request.getfixturevalue("accelerator")
    optimizer, _ = trained(method, check_finite=looks)
    for name, p in optimizer._parameters.named.items():
        torch.testing.assert_close(p, expected._parameters.named[name])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_read_if_nobody_looks(method, monkeypatch, accelerator):
    bound = ON_THE_HOST.get(method, 0)
    assert reads_of_a_step(*trained(method, check_finite=False), monkeypatch) == bound


def test_a_large_network_pays_a_second_read_and_no_copy(monkeypatch, accelerator):
    monkeypatch.setattr("llqr._vectors.RUN", 100)
    assert reads_of_a_step(*trained("SAM"), monkeypatch) == 2


def test_a_scaler_looks_in_the_place_of_the_step(monkeypatch, accelerator):
    def reads(optimizer, problem):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        minimize = optimizer.minimize
        optimizer.minimize = lambda problem: minimize(problem, scaler=scaler)
        optimizer.minimize(problem)
        return reads_of_a_step(optimizer, problem, monkeypatch)

    nobody = trained("nothing", check_finite=False)
    assert reads(*trained("SAM")) == reads(*nobody) + 1


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_probed_where_the_unread_gradient_is_not_finite(method, accelerator):
    optimizer, problem = trained(method)
    before = [p.clone() for p in problem.model.parameters()]
    statistics = [b.clone() for b in problem.model.buffers()]
    passes, seen = [], optimizer.needs_second_pass

    def forward():
        passes.append([p.clone() for p in problem.model.parameters()])
        loss, z = problem()
        return loss * (float("inf") if len(passes) == 1 else 1.0), z

    with pytest.warns(UserWarning, match="not finite"):
        optimizer.minimize(forward)
    assert len(passes) == 1 + seen and optimizer.skipped_steps == 1
    assert all(p.grad.isnan().all() for p in problem.model.parameters()) or not seen
    for values in (list(problem.model.parameters()), *(passes if seen else [])):
        assert all(map(torch.equal, values, before))
    assert all(map(torch.equal, problem.model.buffers(), statistics))
    expected, same = trained(method)
    expected.minimize(same)
    optimizer.minimize(problem)
    for p, q in zip(problem.model.parameters(), same.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_probe_without_a_positive_norm_is_counted_unread(accelerator):
    optimizer, problem = trained("SAM, diagonal")
    for state in optimizer.geometry.states:
        state["U"].neg_()
    before = [p.clone() for p in problem.model.parameters()]

    def forward():
        assert all(map(torch.equal, problem.model.parameters(), before))
        return problem()

    optimizer.minimize(forward)
    assert optimizer.skipped_probes == 1 and optimizer.skipped_steps == 0
    saved = optimizer.state_dict()["param_groups"][0]["llqr.skipped_probes"]
    assert saved == 1 and type(saved) is int


def test_what_is_not_finite_gets_into_the_weights_if_nobody_looks():
    optimizer, problem = trained("SAM", check_finite=False)
    problem.x.fill_(float("inf"))
    optimizer.minimize(problem)
    assert optimizer.skipped_steps == 0 and problem.model[0].weight.isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_square_out_of_range_is_no_infinity(method, read, scale, request):
    if not read:
        request.getfixturevalue("accelerator")
    optimizer, problem = trained(method)
    clean = [True, False]  # which pass is next

    def forward():
        loss, z = problem()
        return loss * (scale if clean.pop(0) else 1.0), z

    if optimizer.needs_second_pass:
        optimizer.minimize(forward)
        assert optimizer.skipped_steps == 0 and clean == []


class Own(llqr.Optimizer):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [llqr.Optimizer, Own])
def test_a_profiler_sees_the_steps_and_hooks_run_once(kind):
    problem, seen = Problem(1), []
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    optimizer = kind(base, problem.model, perturbation=llqr.SAM())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    base.register_step_post_hook(lambda *_: seen.append("base"))
    optimizer.minimize(problem)
    assert seen == ["before", "base", "after"]
    with torch.profiler.profile() as profile:
        optimizer.minimize(problem)
    names = {event.key for event in profile.key_averages()}
    expected = {f"Optimizer.step#{kind.__name__}.step", "Optimizer.step#SGD.step"}
    assert names >= {*expected, "Optimizer.zero_grad#SGD.zero_grad"}


def test_a_base_that_fills_gradients_with_zeros():
    class Filling(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            super().zero_grad(set_to_none=False)

    ends = []
    for kind in (torch.optim.SGD, Filling):
        problem = Problem(1)
        base = kind(problem.model.parameters(), lr=0.1)
        optimizer = llqr.Optimizer(base, problem.model, perturbation=llqr.SAM(0.5))
        for _ in range(3):
            optimizer.minimize(problem)
        ends.append(problem.model[0].weight)
    assert torch.equal(*ends)


@pytest.mark.parametrize("library", ["random", "numpy.random"])
def test_a_generator_is_asked_for_its_state_only_after_it_drew(library, monkeypatch):
    generator = pytest.importorskip(library)
    numpy = library.startswith("numpy")
    generator.seed(0)
    RandomState()
    calls, normal = [], generator.randn if numpy else lambda: random.gauss(0, 1)
    names = ("get_state", "set_state") if numpy else ("getstate", "setstate")
    for name in names:
        real = getattr(generator, name)

        def watched(*args, real=real, name=name, **options):
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(generator, name, watched)
    RandomState().restore()
    assert calls == []
    for draw in (generator.rand if numpy else random.random, normal, normal, normal):
        before = RandomState()
        drawn = draw()
        before.restore()
        assert draw() == drawn
    assert set(calls) == set(names)


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
@pytest.mark.parametrize("cloned", [False, True])
def test_copies_of_many_tensors(empty, cloned, monkeypatch):
    if not cloned:  # as elsewhere than on a CPU, and before torch had the call
        monkeypatch.setattr("llqr._vectors.FOREACH_CLONE", None)
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
