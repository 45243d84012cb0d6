"""How tensors lie in memory: strides that a fused base walks through, and where views start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llqr
from tiny import F64, STRUCTURES, Problem, llqr_of, optimizer_of, same

FUSED = {
    "SGD": lambda ps, **k: torch.optim.SGD(ps, lr=0.1, momentum=0.9, **k),
    "Adam": lambda ps, **k: torch.optim.Adam(ps, lr=0.01, **k),
    "AdamW": lambda ps, **k: torch.optim.AdamW(ps, lr=0.01, **k),
}


def convolutions():
    """A convolution and a transposed one: neither kernel reads the same in both orders."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 3),
    )
    return Problem(model.to(F64), torch.randn(6, 2, 4, 4, dtype=F64), torch.randint(3, (6,)))


def trained(base, structure, layout, fused, **options):
    problem = convolutions()
    problem.model.to(memory_format=layout)
    problem.x = problem.x.contiguous(memory_format=layout)
    optimizer = optimizer_of(
        problem,
        FUSED[base](problem.model.parameters(), fused=fused),
        geometry=llqr_of(structure) if structure != "none" else None,
        **options,
    )
    for _ in range(3):
        optimizer.minimize(problem)
    return problem.model.state_dict()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("structure", ["none", *STRUCTURES])
@pytest.mark.parametrize("base", FUSED)
def test_a_fused_base_updates_the_right_entries(base, structure, layout):
    options = {"perturbation": llqr.SAM(0.05), "graft": structure == "kfac"}
    found = trained(base, structure, layout, True, **options)
    wanted = trained(base, structure, torch.contiguous_format, False, **options)
    # Rounding differs with the order of the sums; an entry in a wrong place is off by 1e-2.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


class Halves(llqr.Geometry):
    """A metric of one's own, whose results lie as they happen to."""

    def apply(self, gradients):
        return {n: (0.5 * g.mT.contiguous()).mT for n, g in gradients.items() if g.dim() > 1} | {
            n: 0.5 * g for n, g in gradients.items() if g.dim() < 2
        }


def test_a_metric_of_ones_own_need_not_care():
    problem = convolutions()
    seen = {}
    base = FUSED["SGD"](problem.model.parameters(), fused=True)
    optimizer = optimizer_of(problem, base, geometry=Halves())
    base.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.stride() for n, p in problem.model.named_parameters()})
    )
    optimizer.minimize(problem)
    assert seen == {n: p.stride() for n, p in problem.model.named_parameters()}


def test_what_already_lies_right_is_not_copied():
    problem = convolutions()
    given, handed = {}, {}

    class Noted(llqr.Geometry):
        def apply(self, gradients):
            moved = {n: 0.5 * g for n, g in gradients.items()}
            given.update({n: x.data_ptr() for n, x in moved.items()})
            return moved

    base = FUSED["SGD"](problem.model.parameters(), fused=True)
    optimizer = optimizer_of(problem, base, geometry=Noted())
    base.register_step_pre_hook(
        lambda *_: handed.update(
            {n: p.grad.data_ptr() for n, p in problem.model.named_parameters()}
        )
    )
    optimizer.minimize(problem)
    assert given == handed


@pytest.mark.parametrize("structure", STRUCTURES)
def test_parameters_with_gaps_between_their_entries(structure):
    """A column of a larger matrix, and a transposed one: no gradient can lie like the first."""

    def build(dense):
        torch.manual_seed(0)
        model = nn.Linear(4, 3).to(F64)
        wide = torch.randn(3, 8, dtype=F64)
        model.weight = nn.Parameter(wide[:, ::2].clone() if dense else wide[:, ::2])
        x, y = torch.randn(12, 4, dtype=F64), torch.randint(3, (12,))
        problem = Problem(model, x, y)
        return problem, optimizer_of(
            problem, geometry=llqr_of(structure), perturbation=llqr.FriendlySAM(0.1)
        )

    (problem, optimizer), (plain, twin) = build(False), build(True)
    assert not problem.model.weight.is_contiguous()
    for _ in range(4):
        optimizer.minimize(problem)
        twin.minimize(plain)
    torch.testing.assert_close(problem.model.state_dict(), plain.model.state_dict())


class Spectral(nn.Module):
    """A layer on complex numbers whose weights are pairs (FNO), behind a bias of odd length."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(5))
        self.weight = nn.Parameter(torch.randn(3, 4, 2))
        self.other = nn.Parameter(torch.randn(4, 3, 2))

    def forward(self, x):
        z = (x + self.shift)[:, :4].to(torch.complex128)
        z = torch.tanh((z @ torch.view_as_complex(self.other)).real).to(torch.complex128)
        return (z @ torch.view_as_complex(self.weight)).abs()[:, :3]


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_pairs_that_are_read_as_complex_numbers(structure, curvature):
    """Directions are parts of one vector; view_as_complex refuses those at odd places."""
    torch.manual_seed(0)
    problem = Problem(Spectral().to(F64), torch.randn(12, 5, dtype=F64), torch.randint(3, (12,)))
    geometry = llqr_of(structure, curvature=curvature, block_size=None)
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=llqr.SAM(0.05))
    losses = []
    for _ in range(6):
        losses.append(float(optimizer.minimize(problem)))
        moved = optimizer.geometry.apply(problem.gradient())
        for name in ("weight", "other"):
            torch.view_as_complex(moved[name])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("probe", [llqr.SAM, llqr.ASAM, llqr.FisherSAM, llqr.FriendlySAM])
def test_probes_in_channels_last(probe):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        ends.append(trained("SGD", "none", layout, True, perturbation=probe(0.05)))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_p_grad_after_the_step_is_the_users_own_tensor():
    problem = convolutions()
    problem.model.to(memory_format=torch.channels_last)
    base = FUSED["SGD"](problem.model.parameters(), fused=True)
    optimizer = optimizer_of(problem, base, geometry=llqr_of("kfac"))
    optimizer.refresh(problem)
    optimizer.zero_grad()
    F.cross_entropy(problem.model(problem.x), problem.y).backward()
    mine = {n: p.grad for n, p in problem.model.named_parameters()}
    values = copy.deepcopy(mine)
    optimizer.step()
    for name, p in problem.model.named_parameters():
        assert p.grad is mine[name]
        same(p.grad, values[name])
