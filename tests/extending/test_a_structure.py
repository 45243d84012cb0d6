"""A structure of one's own, in one file: U scales the rows of each matrix, U X = diag(b) X."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import llqr
from llqr.geometry.structures import Structure, verify_structure

F64 = torch.float64


class RowScaling(Structure):
    """One number per row: U X = diag(b) X. Everything but U itself is the general default."""

    name, trainable, cut = "row-scaling", ("b",), "rectangles"
    linear = True

    def identity(self, device):
        return {"b": self.batch_of_ones(self.group.matrix_shape[0], device=device)}

    def apply(self, state, x):
        return state["b"][:, :, None] * x  # (count, m, 1) * (count, m, n)

    def project(self, state, bounds):
        return {"b": state["b"].clamp(*bounds)}


def network() -> nn.Module:
    """Weights only: 1-D parameters are elementwise in every structure."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).to(
        F64
    )


def batch(rows: slice = slice(None)):
    torch.manual_seed(1)
    return torch.randn(12, 5, dtype=F64)[rows], torch.randint(3, (12,))[rows]


def forward_of(model, x, y):
    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    return forward


def explicit_solve(model, forward, steps=50, lr=0.3, momentum=0.9):
    """The inner solve written out with an explicit U, by autograd on b."""
    weights = list(model.parameters())
    quadratic = llqr.quadratic_model(forward, weights)
    free = [torch.ones(len(w), dtype=F64) for w in weights]
    momenta = [torch.zeros_like(b) for b in free]
    for _ in range(steps):
        u = [-b[:, None] * g for b, g in zip(free, quadratic.gradient, strict=True)]
        image = quadratic.product(u)
        for b, m, g, c in zip(free, momenta, quadratic.gradient, image, strict=True):
            slope = -(g * (g + c)).sum(1)  # dJ/db_i = -sum_j g_ij r_ij
            m.mul_(momentum).add_(slope)
            b.sub_(m, alpha=lr)
    return free


SETTINGS = {"lr": 0.3, "ema": 0.0, "clip": None, "bounds": (1e-6, 1e6)}


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("tolerance", [0, 1e-6])
def test_it_is_solved_right(tolerance, linear):
    """Also without a word on linearity, when the solve runs in buffers."""
    kind = RowScaling if linear else type("Plain", (RowScaling,), {"linear": False})
    model = network()
    geometry = llqr.LLQR(kind, tolerance=tolerance, **SETTINGS)
    geometry.bind(model)
    forward = forward_of(model, *batch())
    report = geometry.refresh([forward])
    assert report.accepted and (report.products == 51 if tolerance == 0 else report.products < 30)
    for entries, expected in zip(
        geometry.state().values(), explicit_solve(model, forward), strict=True
    ):
        torch.testing.assert_close(entries["b.0"], expected, rtol=max(1e-10, tolerance), atol=0)
    assert float(torch.stack([e["b.0"].std() for e in geometry.state().values()]).min()) > 1e-3


def test_it_gets_the_rest_for_nothing(tmp_path):
    """Blocks, spectrum, summary, memory, checkpoint, mixture with other structures."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).to(F64)
    geometry = llqr.LLQR(
        lambda name, p: RowScaling if name.startswith("0") else "kfac", block_size=4, **SETTINGS
    )
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, geometry=geometry, perturbation=llqr.SAM(0.05))
    forward = forward_of(model, *batch())
    first = float(optimizer.minimize(forward))
    assert float(optimizer.minimize(forward)) < first
    assert "row-scaling" in geometry.summary()
    assert geometry.numel() == (4 + 4 + 2 + 2) + 6 + (9 + 16) + (9 + 4) + 3
    low, high = geometry.spectrum()["0"]
    b = torch.cat([v for e in geometry.state().values() for k, v in e.items() if k[0] == "b"])
    assert low <= float(b.min()) and high >= float(b.max())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = llqr.LLQR(
        lambda name, p: RowScaling if name.startswith("0") else "kfac", block_size=4, **SETTINGS
    )
    again = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=fresh,
        perturbation=llqr.SAM(0.05),
    )  # fmt: skip
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, entries in geometry.state().items():
        assert all(torch.equal(fresh.state()[name][k], v) for k, v in entries.items())


class Shift(Structure):
    """Two trainable entries, U X = (b_i + c_j) X_ij: each is clipped by its own norm."""

    name, trainable, cut, linear = "shift", ("b", "c"), "rectangles", True

    def identity(self, device):
        m, n = self.group.matrix_shape
        return {
            "b": self.batch_of_ones(m, device=device),
            "c": torch.zeros_like(self.batch_of_ones(n, device=device)),
        }

    def apply(self, state, x):
        return (state["b"][:, :, None] + state["c"][:, None, :]) * x

    def project(self, state, bounds):
        b, c = state["b"], state["c"].clamp(-0.1 * bounds[0], 0.1 * bounds[0])
        return {"b": b.clamp(1.1 * bounds[0], bounds[1] - 0.1 * bounds[0]), "c": c}


def test_several_entries_are_clipped_alike_at_every_tolerance():
    model = network()
    forward = forward_of(model, *batch())
    found = []
    for tolerance in (0, 1e-8):
        geometry = llqr.LLQR(Shift, tolerance=tolerance, **{**SETTINGS, "clip": 1e-3, "lr": 1.0})
        geometry.bind(model)
        geometry.refresh([forward])
        found.append(torch.cat([v for e in geometry.state().values() for v in e.values()]))
    assert float((found[0] - found[1]).norm()) < 1e-7 * float(found[0].norm())
    free = llqr.LLQR(Shift, **{**SETTINGS, "lr": 1.0})
    free.bind(model)
    free.refresh([forward])  # without a clip it would be another U
    other = torch.cat([v for e in free.state().values() for v in e.values()])
    assert float((found[0] - other).norm()) > 1e-3 * float(other.norm())


class LayerScale(Structure):
    """One number per layer: the three methods that have no default, and nothing else."""

    name, trainable, cut, linear = "layer-scale", ("s",), "layer", True

    def identity(self, device):
        return {"s": self.batch_of_ones(device=device)}

    def apply(self, state, x):
        lengths = torch.tensor(self.group.lengths)
        return torch.repeat_interleave(state["s"], lengths) * x

    def project(self, state, bounds):
        return {"s": state["s"].clamp(*bounds)}


class EntryScale(Structure):
    """One number per entry, as elementwise, with the same three methods."""

    name, trainable, cut, linear, elementwise = "entry-scale", ("s",), "layer", True, True

    def identity(self, device):
        return {"s": torch.ones(self.group.numel, dtype=self.group.dtype, device=device)}

    def apply(self, state, x):
        return state["s"] * x

    def project(self, state, bounds):
        return {"s": state["s"].clamp(*bounds)}


@pytest.mark.parametrize(("kind", "twin"), [(LayerScale, "scalar"), (EntryScale, "diagonal")])
@pytest.mark.parametrize("tolerance", [0, 1e-6])
def test_three_methods_are_enough_for_layers_and_entries(kind, twin, tolerance):
    """And equal the structures of the library that they rebuild, checkpoint included."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    forward = forward_of(model, *batch())
    made = []
    for structure in (kind, twin):
        geometry = llqr.LLQR(structure, tolerance=tolerance, **SETTINGS)
        geometry.bind(model)
        assert geometry.refresh([forward]).accepted
        made.append(geometry)
    own, theirs = made
    g = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for name, value in own.apply(g).items():
        torch.testing.assert_close(value, theirs.apply(g)[name], rtol=1e-9, atol=0)
    some = {"0.bias": g["0.bias"]}
    torch.testing.assert_close(own.apply(some), theirs.apply(some), rtol=1e-9, atol=0)
    for layer, ends in own.spectrum().items():
        assert ends == pytest.approx(theirs.spectrum()[layer], rel=1e-9)
    fresh = llqr.LLQR(kind, **SETTINGS)
    fresh.bind(model)
    fresh.load_state(own.state())
    again = fresh.apply(g)
    assert all(torch.equal(again[name], value) for name, value in own.apply(g).items())


def test_a_subclass_of_a_structure_stays_what_it_is():
    kind = llqr.geometry.structures.STRUCTURES["e-kfac"]
    mine = type("Mine", (kind,), {"name": "mine"})
    geometry = llqr.LLQR(mine)
    geometry.bind(network())
    assert {type(part) for part in geometry.blocks.parts} == {mine}


class Unsymmetric(RowScaling):
    """Not a metric."""

    def apply(self, state, x):
        return super().apply(state, x) + 0.1 * x.flip(1) * state["b"][:, :, None] ** 2


class NotLinear(RowScaling):
    """Says linear, but is not."""

    def apply(self, state, x):
        return state["b"][:, :, None].square() * x

    def project(self, state, bounds):
        return {"b": state["b"].clamp(bounds[0] ** 0.5, bounds[1] ** 0.5)}


class WrongKernel(RowScaling):
    """Its fast form is of another structure."""

    def kernel_product(self, x, r, out):
        torch.mul(x * x, r, out=out)


class WrongPullback(RowScaling):
    """Forgets a factor."""

    def pullback(self, state, x, r):
        return {"b": 2 * (x * r).sum(2)}


class OutOfBounds(RowScaling):
    """Projects nothing."""

    def project(self, state, bounds):
        return state


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Unsymmetric, "U = I at identity"),
        (NotLinear, "not linear in its trainable entries"),
        (WrongKernel, "kernel_product"),
        (WrongPullback, "pullback"),
        (OutOfBounds, "eigenvalues"),
    ],
)
def test_a_wrong_structure_is_refused_where_it_is_given(kind, says):
    with pytest.raises(ValueError, match=says):
        verify_structure(kind)
    with pytest.raises(ValueError, match=f"structure: {kind.__name__}.*{says}"):
        llqr.LLQR(kind)


def run_sharded() -> None:
    """What each of two processes does in the test below."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=llqr.LLQR(RowScaling, shard=True, block_size=4, **SETTINGS),
        perturbation=llqr.SAM(0.05),
    )
    half = slice(0, 6) if dist.get_rank() == 0 else slice(6, 12)
    whole_model = network()
    whole = llqr.Optimizer(
        torch.optim.SGD(whole_model.parameters(), lr=0.1),
        whole_model,
        geometry=llqr.LLQR(RowScaling, block_size=4, **SETTINGS),
        perturbation=llqr.SAM(0.05),
        process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True),
    )
    for _ in range(3):
        optimizer.minimize(forward_of(model, *batch(half)))
        whole.minimize(forward_of(whole_model, *batch()))
    for a, b in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(
        optimizer.geometry.state().values(), whole.geometry.state().values(), strict=True
    ):
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=0)
    dist.barrier()
    print("equal", flush=True)
    os._exit(0)  # the teardown of gloo aborts at random


def test_sharded_over_two_processes_it_trains_as_in_one():
    from pathlib import Path

    from launch import run

    codes, printed = run(Path(__file__), "sharded", timeout=120)
    assert codes == [0, 0] and printed.count("equal") == 2, printed


if __name__ == "__main__" and sys.argv[1:] == ["sharded"]:
    torch.set_num_threads(1)
    run_sharded()
