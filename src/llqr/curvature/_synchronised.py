"""Batch norm whose statistics are those of the batches of all processes, twice differentiable.

torch's own (``nn.SyncBatchNorm``) has no double backward and needs an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._graphs import nodes_of
from .linearised._base import per_channel

__all__ = ["couples_processes", "is_synchronised", "synchronised_batch_norm"]


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes: each gets it, so that the map is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _sum_over_processes(g, ctx.group), None


def _sum_over_processes(x: Tensor, group: Any) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def is_synchronised(norm: nn.Module) -> TypeGuard[nn.SyncBatchNorm]:
    """Tell whether a module is torch's synchronised batch norm, among several processes."""
    if not (isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return False
    # A subclass may normalise as it likes.
    return type(norm).forward is nn.SyncBatchNorm.forward and dist.get_world_size(_group(norm)) > 1


def _group(norm: nn.SyncBatchNorm) -> Any:
    return norm.process_group or dist.group.WORLD


def synchronised_batch_norm(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor | None:
    """Return w o (x - mean) / sqrt(var + eps) + b with the mean and variance over all processes.

    Running statistics are left as they are. None if there is one value per channel in all.
    """
    over, group = [i for i in range(x.dim()) if i != 1], _group(norm)
    values = torch.full((), x.numel() // max(1, x.shape[1]), dtype=torch.long, device=x.device)
    dist.all_reduce(values, group=group)
    count = int(values)
    if count < 2:  # the same in all processes, so that none waits for the others
        return None
    centred = x - per_channel(_sum_over_processes(x.sum(over), group) / count, x)
    var = _sum_over_processes(centred.square().sum(over), group) / count
    y = centred * per_channel(torch.rsqrt(var + norm.eps), x)
    if norm.weight is not None:
        y = y * per_channel(norm.weight, x)
    return y if norm.bias is None else y + per_channel(norm.bias, x)


def couples_processes(tensors: Sequence[Tensor]) -> bool:
    """Tell whether what other processes computed is in the graph of some tensors.

    There J'v of one process is its part of a sum: <J'v, d> = <v, J d> holds of the sums alone.
    """
    return any(isinstance(node, _SumOverProcesses._backward_cls) for node in nodes_of(tensors))
