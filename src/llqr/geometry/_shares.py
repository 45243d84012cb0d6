"""Which process holds which block of U, when several share it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ._pieces import ELEMENTWISE, Piece, Plan

__all__ = ["share_out"]

Span = Callable[[str, int], tuple[int, int]]


def share_out(plans: Sequence[Plan], size: int, span: Span) -> list[list[Plan]]:
    """Return the plans of each process.

    Elementwise blocks are cut: each process has a run of every parameter. Any other block is
    whole in one process, the one that stores least so far, the largest blocks first.

    Args:
        plans: all blocks, in the order of their leaves.
        size: how many processes there are.
        span: (parameter name, process) to the run of its flat entries.
    """
    shares: list[list[Plan]] = [[] for _ in range(size)]
    loads = [0] * size
    whole = []
    for plan in plans:
        if plan.kind not in ELEMENTWISE:
            whole.append(plan)
            continue
        for rank, share in enumerate(shares):
            cut = [Piece(p.name, None, span(p.name, rank)) for p in plan.block.pieces]
            pieces = tuple(piece for piece in cut if piece.numel)
            if pieces:
                share.append(plan._replace(block=replace(plan.block, pieces=pieces)))
    for plan in sorted(whole, key=_stored, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += _stored(plan)
        shares[rank].append(plan)
    return [sorted(share, key=lambda plan: plan.block.leaf) for share in shares]


def _stored(plan: Plan) -> int:
    """Return how many scalars the block's state has, about."""
    if plan.kind == "scalar" or plan.shape is None:
        return 1
    if plan.kind == "diag-kfac":
        return sum(plan.shape)
    squares = sum(n * n for n in plan.shape)
    return squares + (plan.block.numel if plan.kind == "e-kfac" else 0)
