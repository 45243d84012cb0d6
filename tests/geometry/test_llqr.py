"""LLQR as a whole: when it refreshes, what it stores, saves and returns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import llqr
from explicit import F64, agree, explicit_U, vector
from nets import Zoo, bound, copied, entries, zoo
from tiny import STRUCTURES, llqr_of, mlp, norm_net, optimizer_of, same, says, sgd, train

# -- when ------------------------------------------------------------------------------------------


def refreshes(steps: int, **settings) -> list[int]:
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr.LLQR("diagonal", steps=1, **settings))
    at = []
    optimizer.register_refresh_hook(lambda optimizer, report: at.append(report.step))
    train(optimizer, problem, steps)
    return at


def test_refresh_schedule():
    assert refreshes(7, every=3) == [0, 3, 6]
    assert refreshes(7, every=3, start=2) == [2, 5]
    assert refreshes(4, every=100) == [0]
    assert refreshes(4, every=1) == [0, 1, 2, 3]
    assert refreshes(4, start=9) == []


def test_every_as_a_function_of_the_step():
    assert refreshes(12, every=lambda step: 1 if step < 3 else 4) == [0, 1, 2, 6, 10]


@pytest.mark.parametrize(
    "every, steps",
    [
        (llqr.growing(5, 500), [0, 5, 10, 15, 20, 25, 32, 40, 50, 63, 79, 99]),
        (llqr.growing(2, 8, rate=1), [0, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_gaps_grow_with_the_steps_made(every, steps):
    """Each gap is clamp(t / rate, first, last) of the refresh before it, also after a reload."""
    problem = mlp()
    geometry = bound(problem, "scalar", every=every, steps=1)
    at = []
    for step in range(steps[-1] + 1):
        if geometry.due(step):
            at.append(geometry.refresh([problem], step=step).step)
            state, counters = geometry.state(), geometry.counters()
            geometry = bound(problem, "scalar", every=every, steps=1)
            geometry.load_state(state)
            geometry.load_counters(counters)
    assert at == steps


def test_growing():
    every = llqr.growing(5, 500)
    assert [every(t) for t in (0, 20, 100, 2000, 10**6)] == [5, 5, 25, 500, 500]
    assert every == llqr.growing(5, 500, 4) != llqr.growing(5, 500, 3)
    assert pickle.loads(pickle.dumps(every)) == every
    assert [repr(every), repr(llqr.growing(1, 9, rate=2))] == [
        "growing(5, 500)",
        "growing(1, 9, rate=2)",
    ]
    assert llqr.LLQR().settings.every == every and llqr.LLQR.paper().settings.every == 500
    for wrong, name in [((0, 9), "first"), ((5, 4), "last"), ((5, 9, 0), "rate")]:
        with pytest.raises(ValueError, match=f"{name}: expected a number"):
            llqr.growing(*wrong)


def test_due():
    problem = mlp()
    geometry = bound(problem, every=5, start=3)
    assert [geometry.due(t) for t in (0, 2, 3, 4)] == [False, False, True, True]
    geometry.refresh([problem], step=4)
    assert [geometry.due(t) for t in (4, 8, 9, 50)] == [False, False, True, True]
    geometry.refresh([problem], step=6)  # also one that was not due counts
    assert [geometry.due(t) for t in (9, 10, 11)] == [False, False, True]


@pytest.mark.parametrize("name, value", [("lr", 0.05), ("ema", 0.4)])
def test_schedules_are_read_at_the_step(name, value):
    problem = mlp()
    seen = []

    def schedule(step: int) -> float:
        seen.append(step)
        return value if step == 7 else 0.001

    fixed, scheduled = (bound(problem, "kfac", **{name: v}) for v in (value, schedule))
    for geometry in (fixed, scheduled):
        geometry.refresh([problem], step=7)
    assert set(seen) == {7}
    same(scheduled.state(), fixed.state())
    other = bound(problem, "kfac", **{name: schedule})
    other.refresh([problem], step=8)
    assert not torch.equal(entries(other), entries(fixed))


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure, settings, stored",
    [
        ("identity", {}, 0),
        ("scalar", {}, 2),
        ("diagonal", {}, 57),
        ("diag-kfac", {}, (6 + 5 + 6) + (3 + 6 + 3)),
        ("kfac", {}, (36 + 25 + 6) + (9 + 36 + 3)),
        ("e-kfac", {}, (36 + 25 + 30 + 6) + (9 + 36 + 18 + 3)),
        ("e-kfac", {"bases": "gradient"}, (72 + 50 + 30 + 6) + (18 + 72 + 18 + 3)),
        ("dense", {}, 36**2 + 21**2),
        ("kfac", {"block_size": 4}, (32 + 17 + 20 + 5 + 6) + (25 + 13 + 3)),
        ("dense", {"block_size": 20}, 20**2 + 16**2 + 20**2 + 1),
    ],
)  # fmt: skip
def test_numel_and_memory(structure, settings, stored):
    """5-6-3; blocks of 4 cut 6x5 into (4, 4) (4, 1) (2, 4) (2, 1), and 3x6 into (3, 4) (3, 2)."""
    geometry = bound(mlp(torch.float32), structure, **settings)
    assert geometry.numel() == stored
    assert geometry.numel() == sum(v.numel() for e in geometry.state().values() for v in e.values())
    assert geometry.memory()["preconditioner"] == 4 * stored
    double = bound(mlp(), structure, **settings)
    assert double.numel() == stored and double.memory()["preconditioner"] == 8 * stored
    literal = bound(mlp(torch.float32), structure, tolerance=0, **settings)
    assert literal.memory()["refresh"] < geometry.memory()["refresh"]  # recycling costs memory


def mixed(name: str, parameter: Tensor) -> str:
    return {
        "cls": "scalar", "position": "kfac", "temperature": "scalar", "conv.weight": "e-kfac",
        "conv.bias": "identity", "up.weight": "dense", "up.bias": "dense",
        "embed.weight": "identity", "norm.weight": "kfac", "norm.bias": "diagonal",
    }.get(name, "diag-kfac")  # fmt: skip


def test_summary():
    geometry = bound(zoo(), mixed, block_size=4)
    lines = geometry.summary().splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["parameter", "shape", "structure", "blocks", "stored"],
        ["cls", "1x1x4", "scalar", "1", "1"],
        ["position", "1x7x4", "kfac", "2", str(16 + 16 + 9 + 16)],
        ["temperature", "scalar", "scalar", "1", "0"],
        ["conv.weight", "4x2x2x2", "e-kfac", "2", str(2 * 48)],
        ["conv.bias", "4", "identity", "1", "0"],
        ["up.weight", "4x3x2x2", "dense", "12", str(12 * 16)],
        ["up.bias", "3", "dense", "1", "9"],
        ["embed.weight", "5x4", "identity", "1", "0"],
        ["norm.weight", "4", "diagonal", "1", "4"],
        ["norm.bias", "4", "diagonal", "1", "4"],
        ["head.weight", "3x4", "diag-kfac", "1", "7"],
        ["head.bias", "3", "diagonal", "1", "3"],
    ]
    assert lines[-1] == f"163 parameters, {1 + 57 + 96 + 192 + 9 + 8 + 7 + 3} scalars in U"
    assert geometry.numel() == 373


def test_structures_by_a_function_of_name_and_parameter():
    problem = zoo()
    seen = []

    def structure(name: str, parameter: Tensor) -> str:
        assert parameter is dict(problem.model.named_parameters())[name]
        seen.append(name)
        return mixed(name, parameter)

    geometry = bound(problem, structure, block_size=4, lr=0.003, ema=0.0)
    assert seen == [n for n, _ in problem.model.named_parameters()]
    report = geometry.refresh([problem])
    assert report.accepted and report.change > 0.01
    U = explicit_U(problem.model, mixed, geometry.state(), 4)
    g = problem.matrices["g"]
    parts = dict(zip(geometry.parameters, torch.split(
        g, [p.numel() for p in geometry.parameters.values()]), strict=True))  # fmt: skip
    ug = geometry.apply({n: v.view(geometry.parameters[n].shape) for n, v in parts.items()})
    agree(vector(ug.values()), U @ g, 1e-12)
    assert torch.equal(ug["embed.weight"].reshape(-1), parts["embed.weight"])
    u = -U @ g
    J = float(g @ u + 0.5 * u @ problem.matrices["fisher"] @ u)
    assert report.J_after == pytest.approx(J, rel=1e-10)


def test_an_unknown_structure_of_a_function_names_the_parameter():
    with says(ValueError, "structure", "'kfc'", "'0.bias'"):
        bound(mlp(), lambda name, p: "kfc" if name == "0.bias" else "kfac")


# -- settings --------------------------------------------------------------------------------------


def test_paper_settings():
    fisher, newton = llqr.LLQR.paper("kfac", "fisher"), llqr.LLQR.paper("kfac", "newton")
    common = {
        "every": 500, "steps": 50, "lr": 1e-3, "momentum": 0.9, "clip": 5.0, "damping": 0.0,
        "bases": "learned", "constraint": "none", "block_size": None, "tolerance": 0,
        "solver": "momentum", "start": 0,
    }  # fmt: skip
    for geometry, ema, scale in ((fisher, 0.95, "sum"), (newton, 0.9, "mean")):
        assert {k: getattr(geometry.settings, k) for k in common} == common
        assert geometry.settings.ema == ema and geometry.settings.scale == scale
    assert isinstance(fisher.curvature, llqr.Fisher)
    assert isinstance(newton.curvature, llqr.Newton)
    changed = llqr.LLQR.paper("e-kfac", every=1000, ema=0.925)
    assert changed.settings.every == 1000 and changed.settings.ema == 0.925
    assert changed.settings.lr == 1e-3 and changed.structure == "e-kfac"


def schedule(step):
    return 0.5


@pytest.mark.parametrize(
    "geometry, text",
    [
        (llqr.LLQR(), "LLQR('diagonal')"),
        (llqr.LLQR("kfac", curvature="newton", lr=0.5), "LLQR('kfac', curvature=Newton(), lr=0.5)"),
        (llqr.LLQR(lr=schedule), "LLQR('diagonal', lr=schedule)"),
        (
            llqr.LLQR.paper(),
            "LLQR('e-kfac', every=500, block_size=None, batch_norm='running', lr=0.001, "
            "scale='sum', constraint='none', tolerance=0)",
        ),
        (llqr.NaturalGradient(), "NaturalGradient('e-kfac')"),
        (
            llqr.NaturalGradient("kfac", samples=4, every=10, block_size=None),
            "NaturalGradient('kfac', every=10, block_size=None, samples=4)",
        ),
    ],
)
def test_repr_shows_what_differs_from_the_defaults(geometry, text):
    assert repr(geometry) == text
    made = eval(text, vars(llqr) | {"schedule": schedule})
    assert made.settings == geometry.settings
    assert type(made.curvature) is type(geometry.curvature)


# -- forwards --------------------------------------------------------------------------------------


def test_several_forwards_are_the_joined_batch():
    problem = mlp()
    joined, parts, weighted = (bound(problem, "kfac", ema=0.0) for _ in range(3))
    joined.refresh([problem])
    parts.refresh([problem.part(0, 6), problem.part(6, 12)])
    weighted.refresh([problem.part(0, 3), problem.part(3, 12)], weights=[1, 3])
    for geometry in (parts, weighted):
        torch.testing.assert_close(entries(geometry), entries(joined), rtol=1e-10, atol=1e-12)


def test_a_divergence_as_curvature():
    """KL gives the Fisher, so the same U; Renyi of order 2 what twice the Fisher gives."""
    problem = mlp()

    def renyi(z: Tensor, z0: Tensor) -> Tensor:
        return (2 * z.log_softmax(-1) - z0.log_softmax(-1)).logsumexp(-1).mean()

    settings = {"ema": 0.0, "tolerance": 0}
    twice = bound(problem, "kfac", scale=2.0, **settings)
    own = bound(problem, "kfac", curvature=llqr.Divergence(renyi), **settings)
    for geometry in (twice, own):
        assert geometry.refresh([problem]).accepted
    torch.testing.assert_close(entries(own), entries(twice), rtol=1e-10, atol=1e-12)


def test_newton_needs_the_loss_alone():
    problem = mlp()
    alone, both = (bound(problem, "kfac", curvature="newton") for _ in range(2))
    alone.refresh([problem.loss])
    both.refresh([problem])
    same(alone.state(), both.state())
    with says(ValueError, "only a loss"):
        bound(problem, "kfac").refresh([problem.loss])


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bases", ["learned", "gradient"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_state_round_trip(structure, bases):
    """Another geometry goes on bitwise: the same refreshes, the same U g."""
    problem = zoo()
    settings = {"bases": bases, "block_size": 4, "lr": 0.003, "ema": 0.5, "renew_every": 2}
    geometry, other = (bound(problem, structure, **settings) for _ in range(2))
    geometry.refresh([problem])
    other.load_state(copied(geometry))
    other.load_counters(geometry.counters())
    for _ in range(2):
        assert geometry.refresh([problem]).J_after == other.refresh([problem]).J_after
    same(other.state(), geometry.state())
    assert other.counters() == geometry.counters()
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    same(other.apply(g), geometry.apply(g))


def test_states_that_do_not_fit_change_nothing():
    geometry = bound(mlp(), "kfac")
    good = copied(bound(mlp(), "kfac"))
    for spoil, said in (
        (lambda s: s.pop("0.weight"), "no 'A.0'"),
        (lambda s: s["0.weight"].pop("B.0"), "no 'B.0'"),
        (lambda s: s["2.bias"].update(U=torch.ones(4)), r"shape \(4,\), expected \(3,\)"),
    ):
        state = {n: dict(e) for n, e in good.items()}
        spoil(state)
        before = copied(geometry)
        with says(ValueError, "state", "kfac", said):
            geometry.load_state(state)
        same(copied(geometry), before)


def test_binding_again_with_more_parameters_keeps_u():
    problem = zoo()
    named = dict(problem.model.named_parameters())
    late = ("cls", "position", "conv.weight")  # early in the model: blocks move in the layout
    geometry = llqr.LLQR("kfac", block_size=3, ema=0.0, lr=0.003)
    geometry.bind(problem.model, {n: p for n, p in named.items() if n not in late})
    assert geometry.refresh([problem]).accepted
    before = copied(geometry)
    geometry.bind(problem.model, named)
    assert list(geometry.state()) == list(named)
    for name, own in copied(geometry).items():
        if name in before:
            same(dict(sorted(own.items())), dict(sorted(before[name].items())))
        else:
            for key, value in own.items():
                eye = torch.eye(len(value), dtype=F64) if value.dim() == 2 else value * 0 + 1
                assert torch.equal(value, eye), (name, key)


# -- using U ---------------------------------------------------------------------------------------


def test_unbound_geometries_say_what_to_do():
    geometry = llqr.LLQR("kfac")
    for use in (
        lambda: geometry.apply({}),
        geometry.spectrum,
        geometry.numel,
        geometry.memory,
        geometry.summary,
        geometry.state,
        lambda: geometry.load_state({}),
        lambda: geometry.refresh([lambda: None]),
    ):
        with says(RuntimeError, "LLQR is not bound to a model", "llqr.Optimizer"):
            use()


def test_unknown_gradients_are_named():
    with says(KeyError, "gradients", "'head'"):
        bound(mlp()).apply({"head": torch.zeros(3)})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_absent_gradients_count_as_zero(structure):
    """U g of the names given alone; in `dense` and `scalar` layers too."""
    problem = zoo()
    geometry = bound(problem, structure, ema=0.0, lr=0.003)
    geometry.refresh([problem])
    whole = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    given = ("head.bias", "position", "up.weight")
    zeros = {n: v if n in given else 0 * v for n, v in whole.items()}
    expected = geometry.apply(zeros)
    found = geometry.apply({n: whole[n] for n in given})
    assert list(found) == list(given)
    same(found, {n: expected[n] for n in given})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_precision_of_u_and_of_what_it_returns(structure):
    """U is float32 for half precision; U g has the gradient's dtype; g is not changed."""
    model = Zoo().to(torch.bfloat16)
    geometry = llqr.LLQR(structure)
    geometry.bind(model)
    for own in geometry.state().values():
        assert all(v.dtype == torch.float32 for v in own.values())
    g = {n: torch.randn(p.shape).bfloat16() for n, p in model.named_parameters()}
    before = {n: v.clone() for n, v in g.items()}
    ug = geometry.apply(g)
    assert all(v.dtype == torch.bfloat16 for v in ug.values())
    same(ug, before)  # U = I
    same(g, before)
    for n, v in ug.items():
        v.zero_()
        assert torch.equal(g[n], before[n])


def test_one_device():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with says(ValueError, "one device", "cpu", "meta"):
        llqr.LLQR("kfac").bind(model)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_what_a_refresh_sees_of_batch_norm(batch_norm):
    """Through the optimizer: no dropout, and the statistics of the batch or the running ones."""
    problem = norm_net(dropout=0.5)
    geometry = llqr.LLQR("kfac", ema=0.0, batch_norm=batch_norm)
    optimizer = optimizer_of(problem, geometry=geometry)
    problem.model.train()
    optimizer.refresh(problem)
    assert problem.model.training
    alone = bound(problem, "kfac", ema=0.0)
    problem.model[1].train(batch_norm == "batch")
    alone.refresh([problem])
    same(optimizer.geometry.state(), alone.state())


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LLQR", "elementwise", "matrix"])
def test_gradients_that_are_not_the_parameters_are_named(kind):
    problem = mlp()
    geometry = {
        "LLQR": llqr.LLQR("kfac"),
        "elementwise": llqr.FixedGeometry({"0.bias": torch.tensor(2.0)}),
        "matrix": llqr.FixedGeometry(torch.eye(57, dtype=F64)),
    }[kind]
    geometry.bind(problem.model)
    good = problem.gradient()
    for bad, error, parts in [
        ({"1.weight": good["0.weight"]}, KeyError, ["1.weight"]),
        ({"0.weight": good["0.weight"].T}, ValueError, ["0.weight", r"\(5, 6\)", r"\(6, 5\)"]),
        ({"0.bias": torch.tensor(1.0)}, ValueError, ["0.bias", r"\(\)", r"\(6,\)"]),
        ({"0.bias": torch.ones(6).long()}, ValueError, ["0.bias", "int64"]),
        ({"0.bias": torch.ones(6) * 1j}, ValueError, ["0.bias", "complex64"]),
    ]:
        with says(error, "gradients: ", *parts):
            geometry.apply({**good, **bad})
    assert list(geometry.apply({"2.bias": good["2.bias"].float()})) == ["2.bias"]


# -- application in lower precision ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_application_in_bfloat16_is_close(structure, dtype):
    """It rounds what U changes, kfac's alone; learning and checkpoints do not see it."""
    problem = zoo() if dtype == F64 else mlp(dtype)
    options = {"lr": 0.02, "ema": 0.5}
    full = bound(problem, structure, **options)
    low = bound(problem, structure, application="bfloat16", **options)
    for _ in range(2):
        for geometry in (full, low):
            geometry.refresh([problem])
        same(low.state(), full.state())
        g = {n: torch.randn_like(p).detach() for n, p in full.parameters.items()}
        wanted, found = full.apply(g), low.apply(g)
        rounded = False
        for n, x in g.items():
            change, error = (wanted[n] - x).norm(), (found[n] - wanted[n]).norm()
            assert found[n].dtype == dtype and float(error) <= 0.01 * float(change)
            rounded |= bool(error > 0)
        assert rounded is (structure == "kfac")
    low.load_state(bound(problem, structure, **options).state())
    same(low.apply(g), bound(problem, structure, **options).apply(g))


def test_application_in_bfloat16_trains():
    problem = mlp(torch.float32)
    geometry = llqr_of("kfac", application="bfloat16")
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=llqr.SAM(0.05), graft=True)
    losses = train(optimizer, problem, 20)
    assert losses[-1] < losses[0] and optimizer.skipped_probes == 0
    saved = copy.deepcopy(optimizer.state_dict())
    other = mlp(torch.float32)
    other.model.load_state_dict(problem.model.state_dict())
    geometry = llqr_of("kfac", application="bfloat16")
    again = optimizer_of(other, geometry=geometry, perturbation=llqr.SAM(0.05), graft=True)
    again.load_state_dict(saved)
    for o, p in ((optimizer, problem), (again, other)):
        train(o, p, 3)
    same(other.model.state_dict(), problem.model.state_dict())


# -- application in low rank -----------------------------------------------------------------------


def near_identity(n, rank, size, dtype, skew=False):
    """I plus a change of a rank and a size; orthogonal if ``skew``."""
    q, _ = torch.linalg.qr(torch.randn(n, 2 * rank, dtype=F64))
    a, b = q[:, :rank], q[:, rank:]
    change = size * (a @ b.T - b @ a.T if skew else a @ a.T)
    eye = torch.eye(n, dtype=F64)
    return (torch.linalg.matrix_exp(change) if skew else eye + change).to(dtype)


def pair_of_geometries(structure, dtype, rank, size):
    """U near the identity on a layer of 160 x 150, applied in full and in low rank."""
    torch.manual_seed(0)
    model = nn.Linear(150, 160, dtype=dtype)
    pair = []
    for application in ("full", "low-rank"):
        geometry = llqr.LLQR(structure, application=application)
        geometry.bind(model)
        pair.append(geometry)
    state, skew = pair[0].state(), structure == "e-kfac"
    for key, value in state["weight"].items():
        if key == "S.0":
            value.add_(0.3 * torch.rand_like(value))
        else:
            value.copy_(near_identity(len(value[0]), rank, size, dtype, skew))
    pair[1].load_state(state)
    return pair


class CountedProducts(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._schema.name in ("aten::bmm", "aten::baddbmm")
        return func(*args, **(kwargs or {}))


LOW_RANK = pytest.mark.parametrize("structure", ["kfac", "e-kfac"])


@LOW_RANK
@pytest.mark.parametrize(
    "dtype, rank, size, error, products",
    [
        (F64, 5, 0.5, 1e-12, (4, 8)),  # nothing is left out
        (torch.float32, 5, 0.5, 1e-5, (4, 8)),
        (torch.float32, 70, 1e-4, 1e-3, (0, 0)),  # nothing is left
        (F64, 70, 0.5, 0.0, (2, 4)),  # too far from the identity
    ],
)
def test_application_in_low_rank(structure, dtype, rank, size, error, products):
    full, low = pair_of_geometries(structure, dtype, rank, size)
    g = {n: torch.randn_like(p) for n, p in full.parameters.items()}
    wanted, found = full.apply(g)["weight"], low.apply(g)["weight"]
    assert float((found - wanted).norm()) <= error * float(wanted.norm())
    assert found.data_ptr() != g["weight"].data_ptr()
    with CountedProducts() as counted:
        low.apply(g)
    assert counted.calls == products[structure == "e-kfac"]
    assert float(sum((found * g["weight"]).flatten())) > 0
    # A cache: no part of a checkpoint or a copy, and counted.
    same(low.state(), full.state())
    whole = full.memory()
    assert whole["applied"] == 0 and low.memory()["preconditioner"] == whole["preconditioner"]
    made = low.memory()["applied"]
    assert (made > 0) == (rank == 5) and made < whole["preconditioner"]
    assert copy.deepcopy(low).memory()["applied"] == 0
    low.load_state(bound_to(low, "full").state())
    same(low.apply(g), bound_to(low, "full").apply(g))


def bound_to(geometry, application):
    """A new geometry on the same model."""
    new = llqr.LLQR(geometry.structure, application=application)
    new.bind(geometry.model)
    return new


def test_low_rank_stays_positive_definite():
    """Each of 160 eigenvalues is between those of the factors, or one."""
    full, low = pair_of_geometries("kfac", torch.float32, 20, -0.9)
    state = full.state()
    for value in (v for k, v in state["weight"].items() if k != "U"):
        value.add_(torch.diag(1e-4 * torch.rand(len(value[0]))))
    low.load_state(state)
    low.apply({n: torch.randn_like(p) for n, p in full.parameters.items()})
    applied = next(s for s in low._applied[1] if "A left" in s)
    for name in "AB":
        left, right = applied[f"{name} left"][0].double(), applied[f"{name} right"][0].double()
        assert left.shape[1] == 20  # what was added is left out
        m = torch.eye(len(left), dtype=F64) + left @ right.T
        agree(m, m.T, 1e-6)
        values = torch.linalg.eigvalsh(m)
        assert 0.09 < float(values.min()) and float(values.max()) < 1.001


def test_a_change_that_decays_slowly_stays_whole():
    """Full rank, of which every quarter matters more than the error allows."""
    full, low = pair_of_geometries("kfac", F64, 2, 0.1)
    state = full.state()
    a = state["weight"]["A.0"]
    a.copy_(torch.eye(150, dtype=F64) + torch.diag(0.99 ** torch.arange(150.0, dtype=F64)))
    low.load_state(state)
    low.apply({n: torch.randn_like(p) for n, p in full.parameters.items()})
    applied = next(s for s in low._applied[1] if "B left" in s)
    assert torch.equal(applied["A"][0], a)


# -- a model that changes its dtype ----------------------------------------------------------------


@pytest.mark.parametrize("use", ["apply", "refresh", "train"])
@pytest.mark.parametrize("structure", STRUCTURES[1:])
def test_U_follows_the_model_to_double(structure, use):
    """It is what it would be in double from a checkpoint of it in single precision."""
    problem, plain = mlp(torch.float32), mlp(F64)

    def build(p):
        options = {"geometry": llqr_of(structure), "perturbation": llqr.FriendlySAM(0.1)}
        return optimizer_of(p, sgd(p), **options)

    optimizer = build(problem)
    train(optimizer, problem, 3)
    saved = optimizer.state_dict()
    plain.model.load_state_dict(problem.model.state_dict())
    twin = build(plain)
    twin.load_state_dict(saved)
    problem.model.double()
    problem.x = problem.x.double()
    plain.x, plain.y = problem.x, problem.y
    for o, p in ((optimizer, problem), (twin, plain)):
        if use == "apply":
            o.geometry.apply(p.gradient())
        elif use == "refresh":
            assert o.refresh(p).accepted
        else:
            train(o, p, 3)
    same(optimizer.geometry.state(), twin.geometry.state())
    same(problem.model.state_dict(), plain.model.state_dict())
    for entry in optimizer.geometry.state().values():
        assert all(v.dtype == F64 for v in entry.values())
    assert optimizer.geometry.memory() == twin.geometry.memory()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_U_stays_float32_for_half_precision(dtype):
    problem = mlp(torch.float32)
    optimizer = optimizer_of(problem, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.1))
    train(optimizer, problem, 1)
    U = copied(optimizer.geometry)
    problem.model.to(dtype)
    moved = optimizer.geometry.apply({n: g for n, g in problem_gradient(problem, dtype).items()})
    assert all(g.dtype == dtype for g in moved.values())
    same(optimizer.geometry.state(), U)
    fresh = mlp(dtype)
    assert optimizer.geometry.layout.space.rounding == bound(fresh, "kfac").layout.space.rounding


def problem_gradient(problem, dtype):
    problem.x = problem.x.to(dtype)
    return problem.gradient()


def test_pickling_after_use() -> None:
    """A step leaves nothing behind that a copy would carry, or part from."""
    problem = mlp(torch.float32)
    geometry = llqr.LLQR()
    geometry.bind(problem.model)
    geometry.refresh([problem])
    gradients = {n: torch.ones_like(p) for n, p in problem.model.named_parameters()}
    before = len(pickle.dumps(geometry))
    geometry.apply(gradients)
    assert len(pickle.dumps(geometry)) < 1.1 * before
    for twin in (pickle.loads(pickle.dumps(geometry)), copy.deepcopy(geometry)):
        twin.apply(gradients)
        twin.state()["0.weight"]["U"].fill_(3.0)
        assert bool((twin.apply(gradients)["0.weight"] == 3).all())
        assert not bool((geometry.apply(gradients)["0.weight"] == 3).any())


def test_spectrum_is_in_the_order_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 4))
    geometry = llqr.LLQR()
    geometry.bind(model)
    assert list(geometry.spectrum()) == ["0", "1", "2"]
