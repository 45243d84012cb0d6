"""Memory does not grow with the number of steps and refreshes."""

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llqr
from tiny import WAYS, Problem, llqr_of, optimizer_of, sgd


def live_bytes():
    """Bytes of all tensors that Python knows, each memory once."""
    gc.collect()
    sizes = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor):
            try:
                storage = x.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            except Exception:  # sparse, fake and dead ones, which other tests leave: no memory
                continue
    return sum(sizes.values())


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def wide_net():
    """0.5 MB of parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, 448)
    )
    return Problem(model, torch.randn(8, 1, 8, 8), torch.randint(448, (8,)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w == "minimize" else [pytest.mark.slow]) for w in WAYS]
)
def test_300_steps_with_a_refresh_every_10_hold_no_more_than_100(way):
    problem = wide_net()
    optimizer = optimizer_of(
        problem,
        sgd(problem, lr=1e-3, momentum=0.9),
        geometry=llqr_of("kfac", every=10, max_failures=100, steps=3, block_size=64),
        perturbation=llqr.FriendlySAM(0.05),
        graft=True,
    )
    held, pages = [], []
    for step in range(1, 301):
        WAYS[way](optimizer, problem)
        if step % 100 == 0:
            held.append(live_bytes())
            pages.append(resident())
    assert optimizer.geometry.counters()["refreshes"] == 30
    # In 200 steps and 20 refreshes less than one copy of the parameters. (Not zero: Python sees
    # some of torch's tensors at one time and not at another.)
    assert held[2] - held[0] < 4 * sum(p.numel() for p in problem.model.parameters())
    assert pages[2] - pages[0] < 20


def test_a_tensor_kept_a_step_would_be_seen():
    kept, before = [], live_bytes()
    for _ in range(200):
        kept.append(torch.zeros(1000))
    assert live_bytes() - before > 600_000
