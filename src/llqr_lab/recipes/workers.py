"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Workers", "leave_together"]

T = TypeVar("T")


class Workers:
    """Rank, number and device of the processes.

    Args:
        device: "auto", or what torch takes; "auto" and "cuda" take the process's own GPU.
    """

    def __init__(self, device: str = "auto") -> None:
        """Join the other processes, if torchrun has started several."""
        cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        name = (f"cuda:{local}" if cuda else "cpu") if device in ("auto", "cuda") else device
        self.device = torch.device(name)
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank = dist.get_rank() if self.size > 1 else 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Return the model to train: with several processes, their gradients are averaged."""
        if self.size == 1:
            return model
        gpus = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=gpus)

    def own_part(self, batch: Sequence[T]) -> Sequence[T]:
        """Return this process's part of a batch; all parts have the same length.

        With several processes up to ``size - 1`` examples at the end of a batch are left out, so
        that the mean of the processes' mean losses is the mean of the batch.
        """
        return batch[self.rank : len(batch) - len(batch) % self.size : self.size]

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the processes."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(summed)
        return summed.tolist()

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """Return the mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather_lists(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes: first of rank 0, then of rank 1, and so on."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def synchronize(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def leave_together() -> None:
    """Let the processes part: nobody leaves while another still sends.

    Not after an error: the others may wait for what this one will never send, and torchrun ends
    them when it leaves.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
