"""FixedGeometry: a matrix that never changes; and the base class that others fill."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llqr
from explicit import F64, agree, vector
from tiny import flat, mlp, optimizer_of, random_metric, same, says, train, weights


def spd(n: int, seed: int = 0) -> torch.Tensor:
    raw = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return raw @ raw.T / n + 0.1 * torch.eye(n, dtype=F64)


def bound(U, model: nn.Module | None = None) -> llqr.FixedGeometry:
    geometry = llqr.FixedGeometry(U)
    geometry.bind(model or mlp().model)
    return geometry


def test_a_whole_matrix():
    problem = mlp()
    geometry = random_metric(problem)
    geometry.bind(problem.model)
    g = {n: torch.randn_like(p) for n, p in problem.model.named_parameters()}
    agree(vector(geometry.apply(g).values()), geometry.U @ vector(g.values()), 1e-13)
    values = torch.linalg.eigvalsh(geometry.U)
    assert geometry.spectrum() == {"": pytest.approx((float(values[0]), float(values[-1])))}
    assert geometry.numel() == 57**2


def test_absent_gradients_count_as_zero():
    geometry = bound(spd(57))
    g = {"2.bias": torch.randn(3, dtype=F64), "0.weight": torch.randn(6, 5, dtype=F64)}
    found = geometry.apply(g)
    x = torch.cat([g["0.weight"].reshape(-1), torch.zeros(24, dtype=F64), g["2.bias"]])
    expected = geometry.U @ x
    assert list(found) == ["2.bias", "0.weight"]
    agree(found["2.bias"], expected[-3:], 1e-13)
    agree(found["0.weight"].reshape(-1), expected[:30], 1e-13)
    assert geometry.apply({}) == {}


def test_numbers_shapes_and_matrices_by_name():
    U = {
        "0.weight": torch.tensor(0.5),
        "0.bias": torch.rand(6, dtype=F64) + 0.1,
        "2.weight": spd(18),
    }
    geometry = bound(U)
    g = {n: torch.randn_like(p) for n, p in geometry.parameters.items()}
    found = geometry.apply(g)
    assert torch.equal(found["0.weight"], 0.5 * g["0.weight"])
    assert torch.equal(found["0.bias"], U["0.bias"] * g["0.bias"])
    agree(found["2.weight"].reshape(-1), U["2.weight"] @ g["2.weight"].reshape(-1), 1e-13)
    assert torch.equal(found["2.bias"], g["2.bias"])  # not named: U = I
    found["2.bias"].zero_()
    assert g["2.bias"].any()  # a copy
    values = torch.linalg.eigvalsh(U["2.weight"])
    assert geometry.spectrum() == {
        "0.weight": (0.5, 0.5),
        "0.bias": (float(U["0.bias"].min()), float(U["0.bias"].max())),
        "2.weight": pytest.approx((float(values[0]), float(values[-1]))),
    }
    assert geometry.numel() == 1 + 6 + 18**2


def test_a_square_parameter_is_taken_elementwise_where_the_shapes_say_so():
    """(n, n) for an n x 1 parameter is a matrix; the parameter's own shape goes first."""
    model = nn.Linear(1, 1, bias=False)
    geometry = bound({"weight": torch.tensor([[2.0]])}, model)
    assert float(geometry.apply({"weight": torch.tensor([[3.0]])})["weight"]) == 6.0


def test_gradients_keep_their_dtype():
    geometry = bound(spd(57))
    g = {n: torch.randn(p.shape) for n, p in geometry.parameters.items()}
    assert all(v.dtype == torch.float32 for v in geometry.apply(g).values())


NAN = float("nan")


@pytest.mark.parametrize(
    "U, error, said",
    [
        (spd(56), ValueError, [r"expected shape \(57, 57\)", r"\(56, 56\)"]),
        (-spd(57), ValueError, ["U: expected a positive definite"]),
        (spd(57).tril(), ValueError, ["U: expected a symmetric"]),
        (spd(57) * NAN, ValueError, ["U: ", "not finite"]),
        (spd(57).to(torch.complex128), TypeError, ["U: expected a real tensor"]),
        ({"head": torch.tensor(1.0)}, ValueError, ["no parameter 'head'", "0.weight"]),
        ({"0.bias": torch.ones(5)}, ValueError, [r"U\['0.bias'\]", r"\(6,\)", r"\(5,\)"]),
        ({"0.bias": torch.zeros(6)}, ValueError, [r"U\['0.bias'\]", "positive entries"]),
        ({"0.bias": torch.tensor(-1.0)}, ValueError, [r"U\['0.bias'\]", "positive entries"]),
        ({"2.bias": -torch.eye(3)}, ValueError, [r"U\['2.bias'\]", "positive definite"]),
        ({"2.bias": 3.0}, TypeError, [r"U\['2.bias'\]", "real tensor"]),
    ],
)
def test_what_is_no_metric_is_refused(U, error, said):
    with says(error, *said):
        bound(U)


def test_it_has_nothing_to_refresh_and_nothing_to_save():
    geometry = bound(spd(57))
    assert not geometry.due(0) and not geometry.due(10**6)
    with says(RuntimeError, "FixedGeometry has nothing to refresh"):
        geometry.refresh([lambda: None])
    assert geometry.state() == {} and geometry.counters() == {}
    with says(RuntimeError, "FixedGeometry is not bound to a model"):
        llqr.FixedGeometry(spd(57)).apply({})


def test_a_step_is_u_times_the_gradient():
    problem = mlp()
    geometry = random_metric(problem)
    base = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    optimizer = optimizer_of(problem, base, geometry=geometry)
    g, start = flat(problem.gradient()), flat(weights(problem.model))
    train(optimizer, problem, 1)
    agree(flat(weights(problem.model)), start - 0.1 * geometry.U @ g, 1e-13)


def test_a_metric_of_ones_own():
    """A subclass needs apply alone."""

    class Half(llqr.Geometry):
        def apply(self, gradients):
            return {name: 0.5 * g for name, g in gradients.items()}

    plain, halved = mlp(), mlp()
    train(optimizer_of(plain, torch.optim.SGD(plain.model.parameters(), lr=0.05)), plain, 3)
    base = torch.optim.SGD(halved.model.parameters(), lr=0.1)
    optimizer = optimizer_of(halved, base, geometry=Half())
    train(optimizer, halved, 3)
    same(weights(halved.model), weights(plain.model))
    with says(NotImplementedError, "Half does not tell its spectrum"):
        optimizer.geometry.spectrum()
    assert optimizer.geometry.numel() == 0


class Counted(torch.Tensor):
    """Counts its conversions."""

    conversions = 0

    def to(self, *args, **kwargs):
        Counted.conversions += 1
        return super().to(*args, **kwargs).as_subclass(torch.Tensor)


@pytest.mark.parametrize("whole", [True, False])
def test_U_is_converted_once_per_dtype(whole):
    """U of float64 beside a float32 model: 4 MB per 1,000 entries, not anew at every step."""
    model = torch.nn.Linear(2, 2, bias=False)
    U = torch.eye(4, dtype=torch.float64).mul_(2).as_subclass(Counted)
    geometry = llqr.FixedGeometry(U if whole else {"weight": U})
    geometry.bind(model)
    Counted.conversions = 0
    g = {"weight": torch.randn(2, 2)}
    for _ in range(3):
        torch.testing.assert_close(geometry.apply(g)["weight"], 2 * g["weight"])
        half = geometry.apply({"weight": g["weight"].bfloat16()})["weight"]
        torch.testing.assert_close(half, 2 * g["weight"].bfloat16())
    assert Counted.conversions == 2
    geometry.U = torch.eye(4) if whole else {"weight": torch.eye(4)}
    torch.testing.assert_close(geometry.apply(g)["weight"], g["weight"])
    torch.testing.assert_close(
        geometry.apply({"weight": g["weight"].double()})["weight"], g["weight"].double()
    )
