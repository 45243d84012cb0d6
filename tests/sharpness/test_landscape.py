"""Slices of the loss against the loss at moved weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explicit import F64
from llqr import sharpness
from nets import case
from sharpness_nets import network


def test_a_plane_is_the_loss_at_moved_weights():
    net = network()
    generator = torch.Generator().manual_seed(1)
    given = [
        [torch.randn(p.shape, dtype=F64, generator=generator) for p in net.parameters]
        for _ in range(2)
    ]
    found = sharpness.landscape(net, net.model, given, radius=0.4, points=5, batches=net.batches)
    assert found.coordinates.tolist() == pytest.approx([-0.4, -0.2, 0.0, 0.2, 0.4])
    start = [p.detach().clone() for p in net.parameters]
    for i, j in [(0, 0), (1, 4), (2, 2), (3, 0)]:
        a, b = float(found.coordinates[i]), float(found.coordinates[j])
        with torch.no_grad():
            for p, w, d, e in zip(net.parameters, start, *given, strict=True):
                p.copy_(w + a * d + b * e)
            expected = float(net(net.whole[0])[0])
            for p, w in zip(net.parameters, start, strict=True):
                p.copy_(w)
        assert float(found.losses[i, j]) == pytest.approx(expected, rel=1e-12)
    assert found.standard_errors.shape == (5, 5) and found.evaluations == 25
    assert "loss on a plane of 5 x 5 points within 0.4" in str(found)


def test_random_directions_have_the_filters_of_the_weights():
    net = case("conv-bn")
    found = sharpness.landscape(net, net.model, 2, points=3)
    first, second = found.directions
    for p, d in zip(net.parameters, first, strict=True):
        if p.dim() < 2:
            assert not d.any()
        else:
            norms = d.flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, p.detach().flatten(1).norm(dim=1))
    assert not torch.equal(first[0], second[0])
    again = sharpness.landscape(net, net.model, 2, points=3)
    assert torch.equal(found.losses, again.losses)
    assert torch.equal(found.losses[1, 1], net()[0].detach())


def test_a_line_may_leave_the_finite():
    w = nn.Parameter(torch.ones(2))
    axis = [torch.tensor([1.0, 0.0])]
    found = sharpness.landscape(lambda: w.log().sum(), [w], [axis], radius=2, points=3)
    assert [x if x == x else None for x in found.losses.tolist()] == pytest.approx(
        [None, 0.0, 1.0986123]
    )
    assert "1.099, 0 at the centre" in str(found)


def test_normalise_overrules():
    net = case("mlp")
    raw = sharpness.landscape(net, net.model, 1, points=3, normalise="none").directions[0]
    assert all(bool(d.any()) for d in raw)
    given = sharpness.landscape(net, net.model, [raw], points=3, normalise="filter").directions[0]
    kept = sharpness.landscape(net, net.model, [raw], points=3).directions[0]
    assert torch.equal(kept[0], raw[0]) and not given[1].any()
    torch.testing.assert_close(given[0].norm(dim=1), net.parameters[0].detach().norm(dim=1))
