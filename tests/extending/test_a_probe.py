"""A probe of one's own that sees both gradients: GSAM (J. Zhuang et al., ICLR 2022)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import llqr
from llqr.perturbations import total_inner_product

F64 = torch.float64


class GSAM(llqr.SAM):
    """Step along g~ - alpha g_perp, with g_perp the part of g that is orthogonal to g~."""

    def __init__(self, rho: float, alpha: float) -> None:
        super().__init__(rho)
        self.alpha = alpha

    def combine(self, clean, perturbed):
        along = total_inner_product(clean, perturbed) / total_inner_product(perturbed, perturbed)
        return {n: p - self.alpha * (clean[n] - along * p) for n, p in perturbed.items()}


def network(dtype=F64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def forward_of(model, rows=slice(None)):
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(12, 5, dtype=F64)[rows].to(dtype), torch.randint(3, (12,))[rows]

    def forward():
        z = model(x)
        return nn.functional.cross_entropy(z, y), z

    return forward


def written_out(model, U, rho=0.1, alpha=0.4, lr=0.1):
    """One step by the formula, with U a function of {name: gradient}."""
    named = dict(model.named_parameters())

    def gradient():
        loss, _ = forward_of(model)()
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    g = gradient()
    d = U(g)
    norm = sum(float((g[n] * d[n]).sum()) for n in g) ** 0.5
    start = {n: p.detach().clone() for n, p in named.items()}
    with torch.no_grad():
        for n, p in named.items():
            p.add_(d[n], alpha=rho / norm)
    second = gradient()
    flat = lambda v: torch.cat([x.flatten() for x in v.values()])  # noqa: E731
    along = float(flat(g) @ flat(second) / (flat(second) @ flat(second)))
    final = {n: second[n] - alpha * (g[n] - along * second[n]) for n in g}
    step = U(final)
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(start[n] - lr * step[n])


class Fixed:
    """Half of everything, but the first layer."""

    U = {"2.weight": torch.tensor(0.5), "2.bias": torch.tensor(2.0)}

    @classmethod
    def apply(cls, g):
        return {n: float(cls.U.get(n, 1.0)) * x for n, x in g.items()}


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("way", ["minimize", "closure", "passes", "perturbed", "scaler"])
def test_it_is_the_formula(way, metric):
    model, other = network(), network()
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=llqr.FixedGeometry(Fixed.U) if metric else None,
        perturbation=GSAM(0.1, 0.4),
    )
    forward = forward_of(model)
    for _ in range(3):
        written_out(other, Fixed.apply if metric else dict)
        if way == "minimize":
            optimizer.minimize(forward)
        elif way == "closure":
            optimizer.step(lambda: (optimizer.zero_grad(), forward()[0].backward())[1])
        elif way == "passes":
            for _ in optimizer.passes():
                forward()[0].backward()
            optimizer.step()
        elif way == "perturbed":
            optimizer.zero_grad()
            forward()[0].backward()
            with optimizer.perturbed():
                forward()[0].backward()
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            optimizer.minimize(forward, scaler=scaler)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_probe_without_it_keeps_no_clean_gradients():
    """They are as large as the model; only who combines both passes pays for them."""
    alive = {}

    class Spy(llqr.SAM):
        def displacement(self, probe):
            import weakref

            alive["clean"] = weakref.ref(next(iter(probe.gradients.values())))
            return super().displacement(probe)

    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, model, perturbation=Spy(0.1))
    for i in optimizer.passes():
        if i == 1:
            assert alive["clean"]() is None
        forward_of(model)()[0].backward()
    optimizer.step()


def run_bucket_views() -> None:
    """One process whose p.grad are views of DistributedDataParallel's buckets."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    model, twin = network(), network()
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for m, of in ((wrapped, model), (twin, twin)):
        optimizer = llqr.Optimizer(
            torch.optim.SGD(of.parameters(), lr=0.1), m, perturbation=GSAM(0.1, 0.4)
        )
        for _ in range(3):
            optimizer.minimize(forward_of(m))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    print("equal", flush=True)
    os._exit(0)  # the teardown of gloo aborts at random


def run_two() -> None:
    """What each of two processes does in the test below: DDP with sharded U, GSAM on top."""
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, whole_model = nn.parallel.DistributedDataParallel(network()), network()
    alone = dist.new_group([rank], use_local_synchronization=True)
    options = {"lr": 0.1, "ema": 0.5, "block_size": 4}
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        geometry=llqr.LLQR("diagonal", shard=True, **options),
        perturbation=GSAM(0.1, 0.4),
    )
    whole = llqr.Optimizer(
        torch.optim.SGD(whole_model.parameters(), lr=0.1),
        whole_model,
        geometry=llqr.LLQR("diagonal", **options),
        perturbation=GSAM(0.1, 0.4),
        process_group=alone,
    )
    half = slice(0, 6) if rank == 0 else slice(6, 12)
    for _ in range(3):
        optimizer.minimize(forward_of(model, half))
        whole.minimize(forward_of(whole_model))
    for a, b in zip(model.parameters(), whole_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    local = nn.parallel.DistributedDataParallel(network())
    try:
        llqr.Optimizer(
            torch.optim.SGD(local.parameters(), lr=0.1), local,
            perturbation=GSAM(0.1, 0.4), sync=False,
        )  # fmt: skip
    except ValueError as error:
        assert "GSAM" in str(error) and "sync" in str(error)
    else:
        raise AssertionError("a local first gradient was combined with a joined second one")
    dist.barrier()
    print("equal", flush=True)
    os._exit(0)  # the teardown of gloo aborts at random


def test_gradients_that_are_written_in_place_are_kept_apart():
    """A second backward writes into the buckets that the first gradients are views of."""
    from launch import run

    codes, printed = run(Path(__file__), "views", ranks=1, timeout=120)
    assert codes == [0] and "equal" in printed, printed


def test_over_two_processes_it_trains_as_in_one():
    from launch import run

    codes, printed = run(Path(__file__), "two", timeout=120)
    assert codes == [0, 0] and printed.count("equal") == 2, printed


if __name__ == "__main__" and sys.argv[1:] in (["two"], ["views"]):
    torch.set_num_threads(1)
    run_two() if sys.argv[1] == "two" else run_bucket_views()
