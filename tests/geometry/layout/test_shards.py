"""Blocks assigned to processes: every entry once, loads even, blocks kept."""

import pytest
import torch
from torch import nn

from llqr.geometry.layout import Layout, layers_of
from llqr.geometry.layout._shards import assign_shards
from llqr.geometry.structures import STRUCTURES, Vector


class Several:
    """Processes as a layout sees them, without sending anything."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def layouts(model, structure, size, block_size=16):
    layers, transposed = layers_of(model)
    named = dict(model.named_parameters())
    of = lambda name, p: STRUCTURES[structure]  # noqa: E731
    return [
        Layout(named, layers, of, Vector, block_size, transposed, ranks=Several(rank, size))
        for rank in range(size)
    ]


@pytest.mark.parametrize("structure", ["diagonal", "scalar", "kfac", "e-kfac", "dense"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_entry_is_in_one_shard(structure, size):
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.Linear(20, 33))
    numbers, start = {}, 1
    for name, p in model.named_parameters():
        numbers[name] = torch.arange(start, start + p.numel(), dtype=torch.float64).view(p.shape)
        start += p.numel()
    found = []
    for layout in layouts(model.double(), structure, size):
        flat = layout.pack(numbers)
        assert flat.numel() == layout.numel <= layout.width
        whole = layout.pack_all_shards(numbers)
        assert torch.equal(layout.shard_of_this_rank(whole), flat)
        found.append(flat)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(1, start, dtype=torch.float64))


def test_loads_are_even_and_blocks_kept():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(10)])
    shards = layouts(model, "kfac", 4)
    counts = [sum(len(g.blocks) for g in s.groups if g.kind.name == "kfac") for s in shards]
    assert sorted(counts) == [2, 2, 3, 3]
    held = [index for shard in shards for index in shard.space._held_blocks]
    assert set(held) == set(range(20)) and shards[0].space.block_count == 20
    # The matrices are in one shard each, the biases in all.
    assert sorted(held.count(index) for index in range(20)) == [1] * 10 + [4] * 10


def test_nothing_to_assign():
    assert assign_shards([], 3, lambda name, rank: (0, 0)) == [[], [], []]
