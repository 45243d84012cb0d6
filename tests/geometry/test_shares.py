"""Blocks dealt out to processes: every entry once, loads even, leaves kept."""

import pytest
import torch
from torch import nn

from llqr.geometry._layers import Layout
from llqr.geometry._modules import layers_of
from llqr.geometry._shares import share_out


class Several:
    """Processes as a layout sees them, without sending anything."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def layouts(model, structure, size, block_size=16):
    layers, transposed = layers_of(model)
    named = dict(model.named_parameters())
    of = lambda name, p: structure  # noqa: E731
    return [
        Layout(named, layers, of, block_size, transposed, ranks=Several(rank, size))
        for rank in range(size)
    ]


@pytest.mark.parametrize("structure", ["diagonal", "scalar", "kfac", "e-kfac", "dense"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_entry_is_in_one_share(structure, size):
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 33))
    numbers, start = {}, 1
    for name, p in model.named_parameters():
        numbers[name] = torch.arange(start, start + p.numel(), dtype=torch.float64).view(p.shape)
        start += p.numel()
    found = []
    for layout in layouts(model.double(), structure, size):
        flat = layout.pack(numbers)
        assert flat.numel() == layout.numel <= layout.width
        whole = layout.pack_all(numbers)
        assert torch.equal(layout.own(whole), flat)
        found.append(flat)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(1, start, dtype=torch.float64))


def test_loads_are_even_and_leaves_kept():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(10)])
    shares = layouts(model, "kfac", 4)
    counts = [sum(len(g.blocks) for g in s.groups if g.structure == "kfac") for s in shares]
    assert sorted(counts) == [2, 2, 3, 3]
    leaves = [leaf for share in shares for leaf in share._own_leaves]
    assert set(leaves) == set(range(shares[0].leaves)) and shares[0].leaves == 20
    # The matrices are in one share each, the biases in all.
    assert sorted(leaves.count(leaf) for leaf in range(20)) == [1] * 10 + [4] * 10


def test_nothing_to_share():
    assert share_out([], 3, lambda name, rank: (0, 0)) == [[], [], []]
