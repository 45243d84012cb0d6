"""Two devices, and devices without float64: stood in for by labels on tensors of the CPU."""

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llqr
from llqr import _devices
from llqr._vectors import dots, dots_of_runs, inner_products
from llqr.distributed import Ranks
from tiny import F64, WAYS, Problem, close, mlp, optimizer_of, sgd, train, weights

SOURCE = Path(llqr.__file__).parent
FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
#: What takes lists of tensors one by one wherever they are, as on real devices.
ONE_BY_ONE = ("_foreach_", "aten.detach", "aten.copy_", "aten._to_copy")


class TwoDevices(TorchDispatchMode):
    """Give every tensor a device: that of its inputs, which must be one."""

    def __init__(self):
        super().__init__()
        self.labels, self.kept, self.hop = {}, [], None

    def label(self, tensor, device):
        self.labels[id(tensor)] = device
        self.kept.append(tensor)  # so that no id is used again

    def device_of(self, tensor):
        return self.labels.get(id(tensor), FIRST)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Numbers mix with everything, as on real devices.
        devices = [self.device_of(x) for x in inputs if x.dim()]
        name = str(function)
        if len(set(devices)) > 1 and not any(part in name for part in ONE_BY_ONE):
            raise RuntimeError(f"{name}: expected all tensors on one device, got {devices}")
        results = function(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        each = "_foreach_" in name and len(inputs) >= len(found)
        for i, x in enumerate(found):
            source = self.device_of(inputs[i]) if each else (devices or [FIRST])[0]
            self.label(x, self.hop or source)
        return results


class Move(torch.autograd.Function):
    """``to`` another device, and the gradient back."""

    @staticmethod
    def forward(ctx, x, mode, there):
        ctx.mode, ctx.back = mode, mode.device_of(x)
        mode.hop = there
        y = x.clone()
        mode.hop = None
        return y

    @staticmethod
    def backward(ctx, g):
        ctx.mode.hop = ctx.back
        g = g.clone()
        ctx.mode.hop = None
        return g, None, None


class Split(nn.Module):
    """The network of mlp(), its second layer elsewhere."""

    def __init__(self, model, mode):
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x):
        h = torch.tanh(self.model[0](x))
        return Move.apply(self.model[2](Move.apply(h, self.mode, SECOND)), self.mode, FIRST)


@pytest.fixture
def two_devices(monkeypatch):
    mode = TwoDevices()
    plain = Tensor.device
    labelled = property(lambda x: mode.labels.get(id(x), plain.__get__(x)))
    monkeypatch.setattr(Tensor, "device", labelled, raising=False)
    return mode


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "probe",
    [
        lambda: llqr.SAM(0.1),
        lambda: llqr.SAM(0.1, norm="layer-metric"),
        lambda: llqr.SAM(0.1, direction="normalised"),
        lambda: llqr.ASAM(0.1),
        lambda: llqr.FisherSAM(0.1),
        lambda: llqr.FriendlySAM(0.1),
    ],
)
def test_a_model_on_two_devices_trains_as_on_one(two_devices, probe, way):
    """One norm for all; nothing of one device meets anything of the other."""
    plain = mlp()
    train(optimizer_of(plain, sgd(plain, foreach=False), perturbation=probe()), plain, 3, way)
    problem, mode = mlp(), two_devices
    for p in problem.model[2].parameters():
        mode.label(p, SECOND)
    split = Problem(Split(problem.model, mode), problem.x, problem.y)
    base = torch.optim.SGD(split.model.parameters(), lr=0.1, foreach=False)
    with mode:
        optimizer = optimizer_of(split, base, perturbation=probe())
        train(optimizer, split, 3, way)
    # The sums of each device are added up, in another order than those of one.
    close(weights(problem.model), weights(plain.model), 1e-14)


def test_the_stand_in_tells_two_devices_apart(two_devices):
    a, b = torch.ones(2), torch.ones(2)
    two_devices.label(b, SECOND)
    with two_devices, pytest.raises(RuntimeError, match="one device"):
        a + b


def test_what_is_not_finite_on_the_second_device_is_seen(two_devices):
    ranks = Ranks(nn.Linear(1, 1))
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 1):
            tensors = [torch.ones(3), torch.ones(3)]
            two_devices.label(tensors[1], SECOND)
            assert ranks.finite(dict(enumerate(tensors)))
            tensors[place][1] = bad
            assert not ranks.finite(dict(enumerate(tensors)))


def test_inner_products_keep_their_order(two_devices):
    tensors = {str(i): torch.randn(2 ** (2 * i), dtype=F64) for i in range(9)}
    exact = {n: float(x @ x) for n, x in tensors.items()}
    for name in "1358":
        two_devices.label(tensors[name], SECOND)
    found = inner_products(tensors, tensors)
    assert list(found) == list(exact)
    assert found == pytest.approx(exact)


def test_llqr_on_two_devices_is_refused(two_devices):
    problem = mlp()
    two_devices.label(problem.model[2].weight, SECOND)
    with pytest.raises(ValueError, match="needs all parameters on one device"):
        optimizer_of(problem, geometry=llqr.LLQR())


# -- devices without float64 -----------------------------------------------------------------------


class NoDoubles(TorchDispatchMode):
    """The meta device as one without float64: whatever makes such a tensor there fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and x.is_meta and x.dtype == F64:
                raise TypeError(f"{function}: no float64 there")
        return results


@pytest.fixture
def no_doubles(monkeypatch):
    def widest(device):
        return torch.float32 if device.type == "meta" else F64

    for module in ("_devices", "distributed._ranks", "distributed._sharded"):
        monkeypatch.setattr(f"llqr.{module}.widest_dtype", widest)
    with NoDoubles():
        yield


def test_which_devices_have_float64():
    found = {d: _devices.widest_dtype(torch.device(d)) for d in ("cpu", "cuda", "xpu", "mps")}
    assert found == {"cpu": F64, "cuda": F64, "xpu": F64, "mps": torch.float32}


def test_long_sums_without_float64(no_doubles):
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device="meta").double()
    for n in (3, 256, 1000, 70_000):
        rows = torch.ones(4, n, device="meta")
        assert dots(rows, rows[0]).dtype == torch.float32
        assert dots_of_runs(rows, rows[0], n).dtype == torch.float32


def test_numbers_for_other_processes_without_float64(no_doubles, monkeypatch):
    sent = []
    monkeypatch.setattr(Ranks, "size", 2)
    ranks = Ranks(nn.Linear(1, 1, device="meta"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *a, **k: sent.append(x.dtype))
    for send in (lambda: ranks.sum(1.0), lambda: ranks.ranges([(0.0, 1.0)])):
        with pytest.raises(Exception, match="meta"):  # no number can come back from there
            send()
    assert sent == [torch.float32] * 2


def test_every_float64_in_the_library_is_guarded():
    """On the host, of float64 parameters, or by way of _devices: a new one must be looked at."""
    allowed = {
        "_devices.py",  # the guard
        "_vectors.py: widen_to_float32",  # of a gradient that has it
        "_vectors.py: rescale_to_norm",  # finfo
        "_vectors.py: sum_as_double",  # the host
        "geometry/layout/_layout.py: _state_dtype",
        "geometry/inner_solve/_recycled_product.py",  # finfo, the host
        "geometry/inner_solve/_reduced.py",  # the host
        "geometry/structures/_eigenvalues.py: _again_in_double",  # the host
        "geometry/structures/_eigenvalues.py: follow_eigenvectors",  # asks what the device has
        "curvature/_samples.py: divide_samples",  # the host
        "curvature/_samples.py: _sample_dtype",  # of a parameter that has it
        "curvature/sampling/_base.py: widened",  # of a tensor that has it
        "curvature/linearised/_train_batch_norm.py: from_call",  # of an input that has it
        "perturbations/_memory.py: _zero_memory",  # of a parameter that has it
        "geometry/structures/_verify.py",  # a check on the host
        "finding/_inner_lr.py: refresh",  # the host
        "finding/_rho.py: find_rho",  # the host
        "sharpness/_data.py",  # of parameters that have it, the host
        *(
            f"sharpness/_{name}.py"  # the host
            for name in (
                "density",
                "eigenvalues",
                "lanczos",
                "landscape",
                "m_sharpness",
                "mean_curvature",
                "mean_loss",
                "trace",
                "worst_case",
            )
        ),
        "_exact_lqr.py: _roll_out",
    }
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("float64", "double"):
                inside = [
                    f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)
                ]
                found.add((name, f"{name}: {inside[-1]}" if inside else name))
    stray = {where for name, where in found if name not in allowed and where not in allowed}
    assert not stray
