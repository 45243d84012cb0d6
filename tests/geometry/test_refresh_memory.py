"""geometry.memory() against torch's allocator, and what ten refreshes leave behind."""

import itertools

import pytest
import torch
from torch import nn

import llqr
from allocations import peak_of_allocations
from llqr._allocations import Allocations
from tiny import Problem

SIDES = (256, 320, 256, 128)


def wide_net(sides=SIDES, device="cpu"):
    """0.2 million parameters: their vectors outweigh the graph of two samples."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sides))).to(device)
    return Problem(model, torch.randn(2, sides[0]), torch.randint(sides[-1], (2,)))


@pytest.fixture(scope="module")
def problem():
    """A network whose derivatives were compared already, which takes a second graph."""
    problem = wide_net()
    llqr.quadratic_model([problem], problem.model.parameters())
    return problem


def test_tensors_take_what_the_allocator_gives(problem):
    geometry = llqr.LLQR("diag-kfac", steps=2)
    geometry.bind(problem.model)
    with Allocations() as made:
        geometry.refresh([problem])
    measured = peak_of_allocations(lambda: geometry.refresh([problem], step=1))
    assert made.peak == pytest.approx(measured, rel=0.05)


#: Few inner steps: they hold what many hold.
CASES = [
    (llqr.LLQR, "diagonal", {}),
    (llqr.LLQR, "diag-kfac", {}),
    (llqr.LLQR, "kfac", {}),
    (llqr.LLQR, "e-kfac", {}),
    (llqr.LLQR, "e-kfac", {"bases": "gradient", "renew_every": 1}),
    (llqr.LLQR, "diagonal", {"lr": 1e-3}),
    (llqr.LLQR, "kfac", {"lr": 1e-3}),
    (llqr.LLQR, "kfac", {"solver": "adam"}),
    (llqr.LLQR.paper, "diagonal", {}),
    (llqr.LLQR.paper, "kfac", {}),
    (llqr.LLQR.paper, "e-kfac", {}),
    (llqr.LLQR, "scalar", {}),
    (llqr.LLQR, "kfac", {"block_size": 100}),
    (llqr.LLQR, "e-kfac", {"constraint": "square"}),
    (llqr.LLQR, "dense", {"block_size": 16}),
    (llqr.LLQR, "diagonal", {"curvature": "newton"}),
    (llqr.LLQR.paper, "e-kfac", {"curvature": "newton"}),
]


@pytest.mark.parametrize("kind, structure, settings", CASES)
def test_memory_of_a_refresh_is_what_it_allocates(kind, structure, settings, problem, monkeypatch):
    # Told is what a gradient of full rank takes; that of two samples would take less.
    for module in ("_kfac", "_e_kfac"):
        path = f"llqr.geometry.structures.{module}.span_of_columns"
        monkeypatch.setattr(path, lambda x: None)
    geometry = kind(structure, **{"steps": 3, **settings})
    geometry.bind(problem.model)
    with Allocations() as made:
        report = geometry.refresh([problem])
    told = geometry.memory(products=report.products)["refresh"]
    assert told == pytest.approx(made.peak, rel=0.15)


@pytest.mark.parametrize("kind", [llqr.LLQR, llqr.LLQR.paper, llqr.NaturalGradient])
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_memory_is_told_without_memory(kind, structure):
    """A model on the meta device has the numbers of a real one, or an accelerator's float64."""
    told = []
    for device in ("cpu", "meta"):
        geometry = kind(structure)
        geometry.bind(wide_net((64, 48, 32), device).model)
        told.append(geometry.memory())
    on_accelerator = kind is llqr.NaturalGradient and structure == "kfac"  # decomposes in float64
    assert (told[0] == told[1]) != on_accelerator
    assert told[1]["refresh"] >= told[0]["refresh"] > told[0]["preconditioner"]


def test_more_products_take_more_memory():
    geometry = llqr.LLQR("kfac", lr=1e-3)
    geometry.bind(wide_net((64, 48, 32)).model)
    few, many, most = (geometry.memory(products=n) for n in (2, 20, None))
    assert few["refresh"] < many["refresh"] < most["refresh"]
    assert (few["directions"], many["directions"], most["directions"]) == (1, 19, 50)


@pytest.mark.parametrize("kind", [llqr.LLQR, llqr.NaturalGradient])
def test_ten_refreshes_leave_what_one_left(kind):
    problem, geometry = wide_net((64, 48, 32)), kind()
    geometry.bind(problem.model)
    held = []
    with Allocations() as made:
        for step in range(10):
            geometry.refresh([problem], step=step)
            held.append(made.held)
    # The tensors that live: the new U, and nothing more each time.
    assert max(held) <= geometry.memory()["preconditioner"] + 1000
