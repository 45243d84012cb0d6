"""A metric of one's own: closed-form K-FAC, U = (G + l)^-1 (x) (A + l)^-1."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import llqr
from llqr.geometry import Learned, MetricSettings

F64 = torch.float64


class ClosedFormKfac(llqr.StructuredGeometry):
    """U X = (G + l)^-1 X (A + l)^-1 for linear layers, from inputs a and output gradients d.

    A = mean a a', G = rows * sum d d'; vectors keep the identity.
    """

    def __init__(self, damping: float, **settings) -> None:
        super().__init__("kfac", MetricSettings(every=2, **settings))
        self.damping = damping

    def learn(self, forwards, parameters, *, step, weights):
        seen = {}
        handles = []
        for name, module in self.inner_model.named_modules():
            if isinstance(module, nn.Linear):
                keep = lambda m, inputs, output, n=name: seen.update({n: (inputs[0], output)})  # noqa: E731
                handles.append(module.register_forward_hook(keep))
        try:
            loss, _ = forwards[0]()
        finally:
            for handle in handles:
                handle.remove()
        outputs = [output for _, output in seen.values()]
        slopes = torch.autograd.grad(loss, outputs, retain_graph=True)
        g = dict(zip(self.parameters, torch.autograd.grad(loss, parameters), strict=True))
        factors = {}
        for (name, (a, _)), d in zip(seen.items(), slopes, strict=True):
            pair = a.detach().mT @ a.detach() / len(a), len(d) * d.mT @ d
            factors[f"{name}.weight"] = [self.ranks.mean_(x) for x in pair]
        states = []
        for part, old in zip(self.blocks.parts, self.states, strict=True):
            new = {k: v.clone() for k, v in old.items()}
            for i, block in enumerate(part.group.blocks):
                piece = block.slices[0]
                if piece.name in factors and piece.rows is not None:
                    A, G = factors[piece.name]
                    columns, rows = slice(*piece.columns), slice(*piece.rows)
                    new["A"][i] = self._invert(A[columns, columns])
                    new["B"][i] = self._invert(G[rows, rows])
            states.append(new)
        return Learned(states, gradient=self.layout.pack(g))

    def _invert(self, matrix):
        return torch.linalg.inv(matrix + self.damping * torch.eye(len(matrix)).to(matrix))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)


def forward_of(model, rows=slice(None)):
    torch.manual_seed(1)
    x, y = torch.randn(12, 5, dtype=F64)[rows], torch.randint(3, (12,))[rows]

    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    return forward, x


def expected_weight(model, damping):
    """U g of the first weight, written out."""
    forward, x = forward_of(model)
    hidden = model[0](x)
    hidden.retain_grad()
    loss, _ = forward_of(model)[0]()
    z = model[2](torch.tanh(hidden))
    torch.manual_seed(1)
    torch.randn(12, 5, dtype=F64)
    y = torch.randint(3, (12,))
    nn.functional.cross_entropy(z, y).backward()
    A, G = x.mT @ x / 12, 12 * hidden.grad.mT @ hidden.grad
    eye = lambda m: torch.eye(len(m), dtype=F64)  # noqa: E731
    g = torch.autograd.grad(loss, model[0].weight)[0]
    return torch.linalg.inv(G + damping * eye(G)) @ g @ torch.linalg.inv(A + damping * eye(A))


def test_it_is_the_closed_form():
    model = network()
    geometry = ClosedFormKfac(0.1)
    geometry.bind(model)
    forward, _ = forward_of(model)
    report = geometry.refresh([forward])
    g = dict(
        zip(geometry.parameters, torch.autograd.grad(forward()[0], model.parameters()), strict=True)
    )
    moved = geometry.apply(g)
    torch.testing.assert_close(
        moved["0.weight"], expected_weight(network(), 0.1), rtol=1e-10, atol=0
    )
    assert torch.equal(moved["0.bias"], g["0.bias"])
    assert report.J_before is None and "J" not in str(report) and report.change > 0.1
    assert "products" not in str(report) and report.seconds > 0


def test_the_slot_gives_it_the_rest(tmp_path):
    """Training, cadence, summary, memory, checkpoints, load checks, moves to another dtype."""
    model = network()

    def optimizer_on(model, damping=0.1):
        return llqr.Optimizer(
            torch.optim.SGD(model.parameters(), lr=0.02),
            model,
            geometry=ClosedFormKfac(damping, block_size=4),
            perturbation=llqr.SAM(0.05),
        )

    optimizer = optimizer_on(model)
    forward, _ = forward_of(model)
    losses = [float(optimizer.minimize(forward)) for _ in range(5)]
    assert losses[-1] < losses[0] and optimizer.geometry.history.refreshes == 3
    assert optimizer.geometry.memory()["preconditioner"] == 8 * optimizer.geometry.numel()
    assert "kfac" in optimizer.geometry.summary()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin_model = network()
    twin_model.load_state_dict(model.state_dict())
    twin = optimizer_on(twin_model)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for o, m in ((optimizer, model), (twin, twin_model)):
        o.minimize(forward_of(m)[0])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin_model.parameters(), strict=True)
    )
    other = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.02),
        model,
        geometry=ClosedFormKfac(0.1, block_size=3),
    )
    with pytest.raises(ValueError, match="does not fit this geometry"):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    model.float()
    x = torch.randn(4, 5)
    optimizer.geometry.apply({n: torch.randn_like(p) for n, p in model.named_parameters()})
    assert (
        optimizer.geometry.states[0][next(iter(optimizer.geometry.states[0]))].dtype
        == torch.float32
    )
    assert model(x).dtype == torch.float32


def test_what_was_learned_says_one_thing():
    with pytest.raises(ValueError, match="Learned: expected new states.*got new ones and reason"):
        Learned([], reason="no")
    with pytest.raises(ValueError, match="Learned: expected.*got none and reason=None"):
        Learned(None)


def test_the_last_report_and_the_hooks_know_of_the_refusal_that_raised():
    class Refusing(llqr.StructuredGeometry):
        def learn(self, forwards, parameters, *, step, weights):
            return Learned(None, "it never works")

    model, seen = network(), []
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=Refusing("diagonal", MetricSettings(every=1, max_failures=1)),
    )
    optimizer.register_refresh_hook(lambda optimizer, report: seen.append(report.reason))
    with pytest.warns(UserWarning, match="it never works"):
        optimizer.minimize(forward_of(model)[0])
    with pytest.raises(llqr.RefreshError, match="2 refreshes in a row") as error:
        optimizer.minimize(forward_of(model)[0])
    assert seen == ["it never works"] * 2
    assert optimizer.last_report == error.value.report and optimizer.last_report.step == 1


def run_sharded() -> None:
    """What each of two processes does in the test below."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(network())
    alone = dist.new_group([rank], use_local_synchronization=True)
    geometry = ClosedFormKfac(0.1, shard=True, block_size=4)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.02), model, geometry=geometry
    )
    whole_model = network()
    whole = llqr.Optimizer(
        torch.optim.SGD(whole_model.parameters(), lr=0.02),
        whole_model,
        geometry=ClosedFormKfac(0.1, block_size=4),
        process_group=alone,
    )
    # Equal halves, so that the means over processes are those of the joined batch in A; G is
    # compared through one half given to both.
    for _ in range(3):
        optimizer.minimize(forward_of(model, slice(0, 6))[0])
        whole.minimize(forward_of(whole_model, slice(0, 6))[0])
    for a, b in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    stored = sum(v.numel() for s in geometry.states for v in s.values())
    assert 0.3 * geometry.numel() < stored < 0.7 * geometry.numel()
    dist.barrier()
    print("equal", flush=True)
    os._exit(0)  # the teardown of gloo aborts at random


def test_sharded_over_two_processes_it_trains_as_in_one():
    from launch import run

    codes, printed = run(Path(__file__), "sharded", timeout=120)
    assert codes == [0, 0] and printed.count("equal") == 2, printed


if __name__ == "__main__" and sys.argv[1:] == ["sharded"]:
    torch.set_num_threads(1)
    run_sharded()
