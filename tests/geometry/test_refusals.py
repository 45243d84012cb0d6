"""What a refresh meets does not end training: it is refused, told once, and tried again later."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import llqr
from explicit import F64
from nets import bound, copied
from tiny import mlp, optimizer_of, same, says, sgd, train


def accepts_only_from(step: int):
    """An inner rate that overshoots before a step."""
    return lambda t: 1e-3 if t >= step else 50.0


@pytest.mark.parametrize(
    "every, expected",
    [
        (llqr.growing(2, 12), [0, 4, 12, 24, 36, 48, 60, 72]),  # 2, 4, 8, then up to `last`
        (3, [0, 6, 18, 42, 45, 48, 51]),  # 3 x 2, x 4, x 8; accepted at 42
    ],
)
def test_refusals_in_a_row_lengthen_the_gap(every, expected):
    problem = mlp()
    rate = accepts_only_from(100 if callable(every) else 42)
    geometry = bound(problem, "kfac", every=every, lr=rate, ema=0.0, scale=50)
    at = []
    with pytest.warns(UserWarning, match="refused because J did not go down") as found:
        for step in range(expected[-1] + 1):
            if geometry.due(step):
                at.append(geometry.refresh([problem], step=step).step)
    assert at == expected and len([w for w in found if "refused" in str(w.message)]) == 1


def test_a_number_of_failures_keeps_the_gap_and_raises():
    problem = mlp()
    geometry = bound(problem, "kfac", every=3, lr=50.0, ema=0.0, scale=50, max_failures=1)
    with pytest.warns(UserWarning, match="refused"):
        geometry.refresh([problem], step=0)
    assert geometry.due(3)
    with says(llqr.RefreshError, "2 refreshes in a row"):
        geometry.refresh([problem], step=3)


@pytest.mark.parametrize("structure, name", [("e-kfac", "svd"), ("kfac", "eigh")])
def test_a_decomposition_is_tried_again_in_double_and_then_refused(structure, name, monkeypatch):
    original, fails = getattr(torch.linalg, name), {torch.float32}

    def decompose(matrices: Tensor):
        if matrices.dtype in fails:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(matrices)

    problem, settings = mlp(torch.float32), {"lr": 0.5, "bounds": (0.9, 1.1), "ema": 0.0}
    sound, again, refused = (bound(problem, structure, **settings) for _ in range(3))
    expected = sound.refresh([problem])
    monkeypatch.setattr(torch.linalg, name, decompose)
    report = again.refresh([problem])
    assert report.accepted is expected.accepted is True
    for key, entries in again.state().items():
        for k, v in entries.items():
            torch.testing.assert_close(v, sound.state()[key][k], rtol=1e-4, atol=1e-5)
    fails.add(F64)
    before = copied(refused)
    with pytest.warns(UserWarning, match="refused because an eigenvalue or singular value"):
        assert not refused.refresh([problem]).accepted
    same(copied(refused), before)


def test_what_the_forward_raises_is_raised():
    problem = mlp()

    def forward() -> Tensor:
        raise torch.linalg.LinAlgError("of the user's own")

    with pytest.raises(torch.linalg.LinAlgError, match="of the user's own"):
        bound(problem).refresh([forward])


@pytest.mark.parametrize("curvature", ["fisher", "divergence"])
def test_a_network_that_is_saturated_from_the_start(curvature):
    """Its logits lie so far apart that H underflows, as with untouched running statistics."""

    def kl(z: Tensor, at: Tensor) -> Tensor:
        old = at.log_softmax(1)
        return (old.exp() * (old - z.log_softmax(1))).sum(1).mean()

    problem = mlp()
    with torch.no_grad():
        problem.model[2].weight.mul_(1e6)
    kept = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    geometry = bound(
        problem, curvature=llqr.Divergence(kl) if curvature == "divergence" else curvature
    )
    with pytest.warns(UserWarning, match="refused because the loss has no curvature"):
        report = geometry.refresh([problem])
    assert not report.accepted and "certain" in report.reason
    assert geometry.counters()["failures"] == 0
    same(dict(problem.model.named_parameters()), kept)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_untouched_running_statistics_do_not_end_training(curvature):
    """The paper's settings on a deep stack: logits of 1e18 in evaluation mode, of 1 in training."""
    torch.manual_seed(0)
    blocks = [[nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()] for _ in range(20)]
    net = nn.Sequential(*(layer for block in blocks for layer in block), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in net[:-1:3]:
            layer.weight.normal_(0, 4.0)
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    assert net.eval()(x).abs().max() > 1e16 and net.train()(x).abs().max() < 10
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.reset_running_stats()

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return nn.functional.cross_entropy(z, y), z

    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    geometry = llqr.LLQR.paper("diagonal", curvature)
    optimizer = llqr.Optimizer(sgd, net, geometry=geometry, perturbation=llqr.SAM(0.05))
    with pytest.warns(UserWarning, match="a refresh was refused"):
        losses = [float(optimizer.minimize(forward)) for _ in range(12)]
    assert not optimizer.last_report.accepted and optimizer.last_report.step == 0
    assert optimizer.skipped_steps == 0 and max(losses) < 10
    same(geometry.state(), {n: {"U": torch.ones_like(p)} for n, p in net.named_parameters()})


@pytest.mark.parametrize(
    "every, expected",
    [
        (1, [0, 2, 6, 14, 30, 62, 112]),  # 2, 4, 8, 16, 32, then 50
        (60, [0, 60, 120]),  # as asked for: seldom enough
        (llqr.growing(1, 9), [0, 2, 6, 15, 24]),
    ],
)
@pytest.mark.parametrize("max_failures", [None, 0])
def test_a_saturated_network_is_tried_again_soon_but_not_in_each_step(
    every, expected, max_failures
):
    problem = mlp()
    with torch.no_grad():
        problem.model[2].weight.mul_(1e6)
    geometry = bound(problem, every=every, max_failures=max_failures)
    at = []
    with pytest.warns(UserWarning, match="refused because the loss has no curvature"):
        for step in range(expected[-1] + 1):
            if geometry.due(step):
                at.append(geometry.refresh([problem], step=step).step)
    assert at == expected
    with torch.no_grad():
        problem.model[2].weight.mul_(1e-6)
    assert geometry.refresh([problem], step=200).accepted
    assert geometry.counters()["saturated"] == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: nn.functional.l1_loss(z, torch.randn(z.shape, dtype=z.dtype)),
        lambda z, y: nn.functional.multi_margin_loss(z, y),
    ],
    ids=["absolute error", "hinge"],
)
def test_a_loss_that_is_linear_is_an_error_also_far_out(loss):
    problem = mlp()
    with torch.no_grad():
        problem.model[2].weight.mul_(1e6)

    def forward() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return loss(z, problem.y), z

    with says(ValueError, "loss"):
        bound(problem).refresh([forward])


@pytest.mark.parametrize(
    "lr, factor, reason",
    [(1e25, 1.0, "J is not finite"), ("auto", 1e42, "the curvature along U g is zero or not")],
)
def test_numbers_beyond_float32_are_not_credible(lr, factor, reason):
    """They are finite in float64, in which J is added up."""
    problem = mlp()
    settings = {"lr": lr, "constraint": "none", "clip": None, "steps": 1, "ema": 0.0}

    def forward() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return factor * nn.functional.cross_entropy(z, problem.y), z

    with pytest.warns(UserWarning, match=f"refused because {reason}"):
        assert not bound(problem, "diagonal", **settings).refresh([forward]).accepted


def test_training_goes_on_through_refusals():
    """Default settings, a batch that is not finite now and then: no error, and U is kept."""
    problem = mlp()
    optimizer = optimizer_of(problem, sgd(problem), geometry=llqr.LLQR("kfac", every=1))
    train(optimizer, problem, 2)
    bad = problem.part(0, 6)
    bad.x = bad.x * float("nan")
    with pytest.warns(UserWarning, match="refused because the gradient is not finite"):
        for _ in range(6):
            assert not optimizer.refresh(bad).accepted
    assert not optimizer.refresh_due
    assert optimizer.refresh(problem).accepted and optimizer.geometry.counters()["failures"] == 0
