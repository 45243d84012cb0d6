"""Eigenvalues against those of the explicit matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explicit import F64, agree, vector
from llqr import sharpness
from nets import case
from sharpness_nets import network, quadratic

ORDERS = {
    "largest": lambda e: e.flip(0),
    "smallest": lambda e: e,
    "magnitude": lambda e: e[e.abs().argsort(descending=True)],
}


@pytest.mark.parametrize(
    "curvature, which", [*(("newton", w) for w in ORDERS), ("fisher", "largest")]
)
@pytest.mark.parametrize("basis", [12, None])
def test_both_ends_of_both_matrices(curvature, which, basis):
    """With many restarts (12 vectors) and with few, over batches of unequal sizes."""
    net = network()
    C = net.matrices[curvature]
    found = sharpness.eigenvalues(
        net,
        net.model,
        4,
        curvature,
        which=which,
        batches=net.batches,
        tolerance=1e-6,
        basis=basis,
        vectors=True,
        max_products=400,
    )
    expected = torch.linalg.eigvalsh(C)
    size = float(expected.abs().max())
    assert float((found.values - ORDERS[which](expected)[:4]).abs().max()) < 1e-9 * size
    assert found.converged and float(found.residuals.max()) <= 1e-6 * size
    V = torch.stack([vector(v) for v in found.vectors])
    agree(V @ V.mT, torch.eye(4, dtype=F64), 1e-9)
    rests = (V @ C - found.values[:, None] * V).norm(dim=1)
    assert float((rests - found.residuals).abs().max()) < 1e-12 * size
    assert (found.examples, found.batches) == (24, 3)


@pytest.mark.parametrize("name", ["conv-bn", "tied", "attention"])
def test_kinds_of_networks(name):
    net = case(name)
    found = sharpness.eigenvalues(net, net.model, 2, tolerance=1e-7)
    agree(found.values, torch.linalg.eigvalsh(net.matrices["newton"]).flip(0)[:2], 1e-9)


def test_standard_error_between_batches():
    """It is that of v' C_b v, each batch counted by its rows."""
    net = network()
    found = sharpness.eigenvalues(net, net.model, batches=net.batches, vectors=True)
    v = vector(found.vectors[0])
    each = torch.stack([v @ net.matrix_of(b, "newton") @ v for b in net.batches])
    shares = torch.tensor([10.0, 8.0, 6.0], dtype=F64) / 24
    variance = (shares**2 * (each - found.values[0]) ** 2).sum() * 3 / 2
    agree(found.standard_errors[0] ** 2, variance, 1e-10)
    whole = sharpness.eigenvalues(net, net.model, batches=net.whole)
    assert whole.standard_errors is None


@pytest.mark.parametrize(
    "diagonal, which, expected",
    [
        ([0.0, 0.0, 0.0, 0.0], "largest", [0.0, 0.0, 0.0]),
        ([3.0, 3.0, 3.0, 1.0], "largest", [3.0, 3.0, 3.0]),
        ([2.0, 5.0, 0.0, 0.0, 0.0], "smallest", [0.0, 0.0, 0.0]),
        ([-3.0, 2.0, 1.0], "magnitude", [-3.0, 2.0, 1.0]),
        ([-3.0, 2.0, 1.0], "largest", [2.0, 1.0, -3.0]),
    ],
)
def test_multiple_eigenvalues_and_whole_spectra(diagonal, which, expected):
    loss, parameters = quadratic(diagonal)
    found = sharpness.eigenvalues(loss, parameters, 3, which=which, tolerance=1e-9)
    assert found.values.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.converged


def test_float32_measures_its_residuals():
    net = case("mlp")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(net.model.state_dict())
    found = sharpness.eigenvalues(lambda: net.loss(model(net.x.float())), model, 2)
    expected = torch.linalg.eigvalsh(net.matrices["newton"]).flip(0)[:2]
    agree(found.values, expected, 1e-5)
    assert found.converged and float(found.residuals.max()) < 1e-3 * float(expected[0])


def test_too_few_products_are_told():
    net = network()
    with pytest.warns(UserWarning, match="after 8 products a residual is .*raise max_products"):
        found = sharpness.eigenvalues(net, net.model, batches=net.whole, max_products=8)
    assert found.evaluations == 8 and not found.converged and "NOT converged" in str(found)


def test_what_it_says():
    loss, parameters = quadratic([3.0, 1.0])
    text = str(sharpness.eigenvalues(loss, parameters))
    assert text.startswith("largest eigenvalue of Newton(): 3 (residual ")
    assert "no standard error from 1 batch); 1 batch, 3 products, " in text
    several = sharpness.eigenvalues(loss, parameters, 2)
    assert len(str(several).splitlines()) == 3
    assert repr(several).startswith("<Eigenvalues: 3, 1 (residuals <= ")
    assert "; 1 batch, 4 products, " in repr(several)
