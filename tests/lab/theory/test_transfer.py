"""Proposition B.1's experiment: real metrics, real gradients, inequalities that can fail."""

import pytest
import torch

from llqr_lab.theory import transfer
from llqr_lab.theory.transfer import (
    BOUNDS,
    Run,
    check_transfer,
    fitted_slope,
    random_data,
    train_run,
)


@pytest.fixture(scope="module")
def short() -> Run:
    return train_run(64, seed=3)


def test_u_is_learned_within_its_bounds(short):
    values = torch.linalg.eigvalsh(short.metrics)
    assert values.min() >= BOUNDS[0] * (1 - 1e-9) and values.max() <= BOUNDS[1] * (1 + 1e-9)
    changes = (short.metrics[1:] - short.metrics[:-1]).flatten(1).abs().amax(1)
    assert int((changes > 1e-3).sum()) == 15  # refreshes at 0, 4, 8, ...: 15 after the first step
    assert short.change > 0.1
    torch.testing.assert_close(short.metrics, short.metrics.mT, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_whole_loss(short):
    x, y = random_data(3)
    generator = torch.Generator().manual_seed(4)
    w = 3 * torch.randn(1, x.shape[1], dtype=torch.float64, generator=generator)
    w.requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits((x @ w.mT)[:, 0], y)
    expected = torch.autograd.grad(loss, w)[0][0]
    torch.testing.assert_close(short.gradients[0], expected, rtol=0, atol=1e-12)


def test_norms_and_discrepancy():
    gradients = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    metrics = torch.stack([torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2)])
    one = Run(gradients, metrics, 0.0)
    assert one.in_metric(metrics).tolist() == [17.0, 1.0]
    assert one.in_metric(torch.eye(2)).tolist() == [5.0, 1.0]
    assert one.discrepancy.tolist() == [3.0, 0.0]


def test_the_slope_of_a_power():
    assert fitted_slope([4, 16, 64], [3.0, 1.5, 0.75]) == pytest.approx(-0.5)


def test_no_decrease_is_noticed(monkeypatch):
    flat = Run(torch.ones(4, 2), torch.eye(2).expand(4, 2, 2), 1.0)
    monkeypatch.setattr(transfer, "train_run", lambda steps, seed=0: flat)
    rate, euclidean, last = check_transfer((4, 8))
    assert not (rate.confirmed or euclidean.confirmed or last.confirmed)
