"""What a forward may return, and running it again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llqr
from explicit import F64
from llqr.curvature import count_nonzero_rows
from llqr.curvature._forwards import RepeatableForward, RepeatedOutputs, differentiable_in
from nets import case
from tiny import says


@pytest.mark.parametrize(
    "forward, said",
    [
        (lambda net: net()[0].detach(), "no graph"),
        (lambda net: (net()[1], net()[1]), r"scalar loss, got shape \(6, 3\)"),
        (lambda net: 1.0, "tensor, got float"),
        (lambda net: (*net(), 3), "got 3 values"),
    ],
)
def test_forward_is_checked(forward, said):
    net = case("mlp")
    with says(ValueError, "forward", said):
        llqr.quadratic_model(lambda: forward(net), net.parameters)


def test_only_the_first_call_advances_the_random_state() -> None:
    p = torch.ones(3, requires_grad=True)
    forward = RepeatableForward(lambda: torch.rand(3), [p])
    torch.manual_seed(0)
    expected = torch.rand(3)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(forward(), expected) and torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(1)
    elsewhere = torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(forward(), expected)
        assert torch.equal(torch.get_rng_state(), elsewhere)


def test_the_random_state_comes_back_after_an_error() -> None:
    def fail() -> Tensor:
        torch.rand(1)
        raise RuntimeError("on purpose")

    forward = RepeatableForward(fail, [])
    with pytest.raises(RuntimeError):
        forward()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        forward()
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_again_are_the_differentiable_ones_in_order() -> None:
    """Also when nothing carries a graph, as under no_grad."""
    w = torch.ones((), requires_grad=True)
    make = lambda: (w * 1, {"b": w * 3, "a": torch.zeros(()), "c": [w * 4, "no tensor"]})  # noqa: E731
    outputs = make()[1]
    repeat = RepeatedOutputs(RepeatableForward(make, [w]), outputs)
    with torch.no_grad():
        again = repeat()
    assert [z.item() for z in again] == [z.item() for z in differentiable_in(outputs)] == [3, 4]


def test_rows_are_counted_where_the_loss_has_a_gradient() -> None:
    z = torch.randn(4, 3, dtype=F64, requires_grad=True)
    flat, unread = torch.randn(5, requires_grad=True), torch.randn(9, requires_grad=True)
    loss = z[[0, 2]].square().sum() + flat.square().sum()
    assert count_nonzero_rows(loss, [z]) == 2
    assert count_nonzero_rows(loss, [z, flat, unread]) == 5  # the largest; a vector has rows of 1
    assert count_nonzero_rows(0 * loss, [z]) == 1
