"""Eigenvalues to a millionth on networks of thousands of parameters, against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn import functional as F

from explicit import F64, vector
from llqr import sharpness


def network_of(widths: list[int], rows: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    layers = [
        m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.Tanh())
    ]
    model = nn.Sequential(*layers[:-1]).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model, torch.randn(rows, widths[0], dtype=F64), torch.randint(widths[-1], (rows,))


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss of all rows, some hundred columns at a time."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    w = vector(model.parameters())

    def loss(w):
        parts = torch.split(w, [s.numel() for s in shapes.values()])
        named = {n: t.view(s) for (n, s), t in zip(shapes.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, (x,)), y)

    _, pullback = vjp(grad(loss), w)
    column = vmap(lambda v: pullback(v)[0])
    return torch.cat([column(part) for part in torch.eye(len(w), dtype=F64).split(250)])


def fisher_root(model: nn.Module, x: Tensor) -> Tensor:
    """R with J' H J = R' R, (rows x classes, parameters): its squared singular values are C's."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    jacobians = jacrev(lambda named: functional_call(model, named, (x,)))(named)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], 2)  # (rows, classes, parameters)
    p = model(x).detach().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    values, vectors = torch.linalg.eigh(H)
    root = values.clamp_min(0).sqrt()[:, :, None] * vectors.mT
    return (root @ J).flatten(0, 1) / len(x) ** 0.5


def measured(model, x, y, k, curvature="newton", which="largest"):
    def forward(batch):
        z = model(batch[0])
        return F.cross_entropy(z, batch[1]), z

    batches = list(zip(x.split([10, 9, 5]), y.split([10, 9, 5]), strict=True))
    return sharpness.eigenvalues(
        forward, model, k, curvature, which=which, batches=batches, tolerance=1e-7, vectors=True
    )


def prove(found, H, relative=1e-6):
    """Raise unless these are the largest eigenvalues of H, each to this relative error.

    Each lies within |H v - lambda v| of an eigenvalue; and what is left of H without them is below
    the last one, since the difference has a Cholesky factor.
    """
    V = torch.stack([vector(v) for v in found.vectors])
    values = found.values.abs()
    residuals = (V @ H - values[:, None] * V).norm(dim=1)
    assert bool((residuals < relative * values).all()), residuals / values
    rest = H.addmm(V.mT, values[:, None] * V, alpha=-1).neg_()
    rest.diagonal().add_(float(values[-1]) * (1 + relative))
    _, failed = torch.linalg.cholesky_ex(rest)
    assert not failed, "there is a larger one"


def test_the_hessian_of_thousands_of_parameters():
    model, x, y = network_of([12, 50, 40, 4])
    H = hessian(model, x, y)
    assert len(H) == 2_854
    largest, smallest = (
        measured(model, x, y, k, which=w) for k, w in ((3, "largest"), (1, "smallest"))
    )
    prove(largest, H)
    prove(smallest, H.neg())
    # The proof can fail: of pairs that leave out the second one.
    largest.values[1], largest.vectors[1] = largest.values[2], largest.vectors[2]
    with pytest.raises(AssertionError, match="there is a larger one"):
        prove(largest, H)


def test_the_fisher_matrix_just_below_ten_thousand():
    model, x, y = network_of([20, 100, 70, 10])
    assert sum(p.numel() for p in model.parameters()) == 9_880
    R = fisher_root(model, x)
    found = measured(model, x, y, 4, "fisher")
    expected = torch.linalg.eigvalsh(R @ R.mT).flip(0)[:4]
    assert float(((found.values - expected) / expected).abs().max()) < 1e-9
