"""Forwards that do not keep their graphs, and parameters that take no part."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import agree, vector
from nets import Case, product
from nets import mlp as network
from tiny import F64, Problem, mlp, says


def parts(rows: int = 12, count: int = 4) -> tuple[Problem, list[Problem]]:
    whole = mlp(rows=rows)
    size = rows // count
    return whole, [whole.part(i * size, (i + 1) * size) for i in range(count)]


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4]])
def test_same_numbers(curvature: str, scale: str, weights: Any) -> None:
    _, forwards = parts()
    parameters = list(forwards[0].model.parameters())
    options = {"scale": scale, "weights": weights}
    kept = llqr.quadratic_model(forwards, parameters, curvature, **options)
    spared = llqr.quadratic_model(forwards, parameters, curvature, micro_batch=1, **options)
    d = [torch.randn_like(p) for p in parameters]
    for _ in range(2):
        agree(vector(spared.product(d)), vector(kept.product(d)), 1e-13)
    agree(vector(spared.gradient), vector(kept.gradient), 1e-13)
    assert float(spared.loss) == pytest.approx(float(kept.loss), rel=1e-13)


def test_chunks_of_equal_size_are_the_whole_batch() -> None:
    whole, forwards = parts()
    parameters = list(whole.model.parameters())
    model = llqr.quadratic_model(forwards, parameters, micro_batch=1)
    d = [torch.randn_like(p) for p in parameters]
    expected = llqr.quadratic_model(whole, parameters).product(d)
    agree(vector(model.product(d)), vector(expected), 1e-12)


@pytest.mark.parametrize("micro_batch, graphs, calls", [(None, 4, 4), (4, 4, 4), (3, 0, 12)])
def test_graphs_are_let_go(micro_batch: int | None, graphs: int, calls: int) -> None:
    """Outputs live as long as their graph; forwards run again for every product, or not."""
    _, forwards = parts()
    alive: list[weakref.ref[Tensor]] = []

    def noted(forward: Problem) -> Any:
        def run() -> tuple[Tensor, Tensor]:
            loss, z = forward()
            alive.append(weakref.ref(z))
            return loss, z

        return run

    parameters = list(forwards[0].model.parameters())
    noting = [noted(f) for f in forwards]
    gc.disable()
    try:
        model = llqr.quadratic_model(noting, parameters, micro_batch=micro_batch)
        for _ in range(2):
            model.product(model.gradient)
        assert sum(r() is not None for r in alive) == graphs
    finally:
        gc.enable()
    assert sum(f.calls for f in forwards) == calls


def test_dropout_is_replayed() -> None:
    """In training mode every product sees the masks of the gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).to(F64)
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(3, (8,))
    forwards = [Problem(net, x[:4], y[:4]), Problem(net, x[4:], y[4:])]
    parameters = list(net.parameters())
    model = llqr.quadratic_model(forwards, parameters, micro_batch=1)
    d = [torch.randn_like(p) for p in parameters]
    assert torch.equal(vector(model.product(d)), vector(model.product(d)))


def test_a_refresh_takes_it() -> None:
    states = []
    for micro_batch in (None, 1):
        _, forwards = parts()
        geometry = llqr.LLQR("diagonal", lr=0.1, ema=0.0, micro_batch=micro_batch)
        geometry.bind(forwards[0].model)
        geometry.refresh(forwards)
        states.append(vector(e["U"] for e in geometry.state().values()))
    agree(states[1], states[0], 1e-10)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_checked(value: Any) -> None:
    whole, _ = parts()
    with says(ValueError, "micro_batch", repr(value).replace(".", r"\.")):
        llqr.LLQR("diagonal", micro_batch=value)
    with says(ValueError, "micro_batch"):
        llqr.quadratic_model(whole, whole.model.parameters(), micro_batch=value)


# -- parameters that take no part ------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_frozen_and_unused_parameters_are_zero(curvature):
    net = network()
    frozen = net.model[0].bias
    frozen.requires_grad_(False)
    unused = nn.Parameter(torch.randn(3, dtype=F64))
    active = [p for p in net.model.parameters() if p.requires_grad]
    everything = [*net.model.parameters(), unused]
    model = llqr.quadratic_model(net, everything, curvature)
    reduced = llqr.quadratic_model(net, active, curvature)
    d = [torch.randn_like(p) for p in everything]
    moved = [v for p, v in zip(everything, d, strict=True) if p is not frozen and p is not unused]
    image = model.product(d)
    for p, g, v in zip(everything, model.gradient, image, strict=True):
        assert g.shape == v.shape == p.shape
        if p is frozen or p is unused:
            assert not g.any() and not v.any()
    known = [v for p, v in zip(everything, image, strict=True) if any(p is q for q in active)]
    agree(vector(known), vector(reduced.product(moved)), 1e-14)


def test_a_penalty_on_the_weights_has_no_gauss_newton_curvature():
    """It does not pass through the outputs; its gradient counts, and Newton sees all of it."""
    net = network()
    plain = Case.matrices.func(net)  # type: ignore[attr-defined]

    def forward() -> tuple[Tensor, Tensor]:
        loss, z = net()
        return loss + 0.05 * sum(p.square().sum() for p in net.parameters), z

    d = torch.randn_like(plain["g"])
    model = llqr.quadratic_model(forward, net.parameters)
    agree(vector(model.gradient), plain["g"] + 0.1 * vector(net.parameters))
    agree(product(model, net.parameters, d), plain["fisher"] @ d)
    newton = llqr.quadratic_model(forward, net.parameters, "newton")
    agree(product(newton, net.parameters, d), plain["newton"] @ d + 0.1 * d)
