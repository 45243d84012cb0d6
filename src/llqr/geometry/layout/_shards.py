"""Which process holds which block of U, when U is sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ._blocks import PlannedBlock, Slice

__all__ = ["assign_shards"]

#: (parameter name, process) -> the run of the parameter's flat entries.
RunOf = Callable[[str, int], tuple[int, int]]


def assign_shards(
    plans: Sequence[PlannedBlock], size: int, run_of: RunOf
) -> list[list[PlannedBlock]]:
    """Return the blocks that each process holds.

    Elementwise blocks are cut: each process has a run of every parameter. Any other block is
    whole in one process, the one that stores least so far, the largest blocks first.

    Args:
        plans: all blocks, in the order of their indices.
        size: how many processes there are.
        run_of: which flat entries of a parameter a process holds.
    """
    shards: list[list[PlannedBlock]] = [[] for _ in range(size)]
    loads = [0] * size
    whole = []
    for plan in plans:
        if not plan.kind.elementwise:
            whole.append((plan.kind.count_stored(plan.block, plan.shape), plan))
            continue
        # Entry by entry: each process takes its run of every parameter, and stores only that of U.
        for rank, shard in enumerate(shards):
            cut = [Slice(s.name, None, run_of(s.name, rank)) for s in plan.block.slices]
            slices = tuple(part for part in cut if part.numel)
            if slices:
                shard.append(plan._replace(block=replace(plan.block, slices=slices)))
    for stored, plan in sorted(whole, key=lambda pair: pair[0], reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += stored
        shards[rank].append(plan)
    return [sorted(shard, key=lambda plan: plan.block.index) for shard in shards]
