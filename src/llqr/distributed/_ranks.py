"""The processes that train one model together, and what they must agree on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter, eq
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .._autocast import AS_IT_IS
from .._devices import (
    SHORT,
    compute_per_device,
    flatten,
    join_short,
    split_by_device,
    widen,
    widest_dtype,
)
from ._sharded import is_sharded, local_all

__all__ = ["Ranks"]

#: Whether this torch has processes at all, which does not change.
AVAILABLE = dist.is_available()
DEVICE = attrgetter("device")
#: Backends with an all-to-all on every device that they serve; gloo has it on the CPU only.
EXCHANGING = {"nccl", "mpi", "ucc", "xccl", "hccl"}


class Ranks:
    """The processes of one data-parallel training; one process is the trivial case.

    They are those of the model's DistributedDataParallel wrapper or of the mesh that
    ``fully_shard`` cut it for; without both, all if torch.distributed is initialised.

    Args:
        model: the network, wrapped or not.
        process_group: instead of what is found.
    """

    def __init__(self, model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
        self._wrapper = _data_parallel(model)
        parameters = list(model.parameters())
        self._sharded: Any = next((p for p in parameters if is_sharded(p)), None)
        self._first = next(iter(parameters), torch.empty(0, device="cpu"))
        self._given = process_group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None is the default one."""
        if self._given is None and self._wrapper is not None:
            return self._wrapper.process_group  # type: ignore[no-any-return]
        if self._given is None and self._sharded is not None:
            return self._sharded.device_mesh.get_group()  # type: ignore[no-any-return]
        return self._given

    @property
    def sharded(self) -> bool:
        """Whether ``fully_shard`` has cut the model's parameters into rows."""
        return self._sharded is not None

    @property
    def size(self) -> int:
        """How many processes there are; looked up anew, since they may be joined at any time."""
        if not (AVAILABLE and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return 0 if self.size == 1 else dist.get_rank(self.group)

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where the group can send from."""
        return self._first.device

    # -- numbers -------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the processes, in place; all of them get the same bits."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def join(self, part: Tensor, width: int) -> Tensor:
        """Return the vectors of all processes, each padded to ``width``, one behind the other."""
        padded = part.new_zeros(width)
        padded[: part.numel()] = part
        return self.stack(padded).view(-1)

    def stack(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked in their order."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)

    def exchange(self, rows: Tensor) -> Tensor:
        """Send row i to process i; return the rows that all sent to this one, in their order."""
        if self.size == 1:
            return rows
        if not self._exchanges(rows.device):  # all get everything, and keep theirs
            return self.stack(rows)[:, self.rank].contiguous()
        received = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(received, rows.contiguous(), group=self.group)
        return received

    def _exchanges(self, device: torch.device) -> bool:
        """Tell whether the group's backend for a device has an all-to-all of tensors."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        backend = backends.get(device.type)
        return backend in EXCHANGING or (backend == "gloo" and device.type == "cpu")

    def sum(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        whole = torch.tensor(value, dtype=widest_dtype(self.device), device=self.device)
        return float(self.sum_(whole))

    def range(self, value: float) -> tuple[float, float]:
        """Return the least and the greatest of a number (infinite where one is not finite)."""
        # A reduction may lose a NaN, but not an infinity.
        ends = (value, value) if math.isfinite(value) else (-math.inf, math.inf)
        return ends if self.size == 1 else self.ranges([ends])[0]

    def ranges(self, ends: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the least of the first and the greatest of the second numbers."""
        wide = widest_dtype(self.device)
        both = torch.tensor([(-a, b) for a, b in ends], dtype=wide, device=self.device)
        if self.size > 1 and ends:
            dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return [(-a, b) for a, b in both.tolist()]

    # -- decisions -----------------------------------------------------------------------------

    def all(self, good: bool) -> bool:
        """Tell whether something holds in every process."""
        return good if self.size == 1 else self.range(0.0 if good else math.inf)[1] == 0

    def finite(self, tensors: Mapping[str, Tensor], *, equal: bool = False) -> bool:
        """Tell whether all entries are finite in every process, with one read from the device.

        Args:
            tensors: {name: tensor}.
            equal: the tensors should be the same everywhere; raise where their largest entries
                are not.
        """
        self._refuse_join()
        if self.size == 1:
            return _are_finite(tensors)
        low, high = self.range(_largest(tensors))
        equal = equal and not self.sharded
        if equal and low != high and math.isfinite(high):
            raise RuntimeError(
                f"the gradients of this step differ between the {self.size} processes (largest "
                f"entries from {low} to {high}), so the replicas would drift apart: wrap the model "
                "in DistributedDataParallel, leave no_sync() before the last backward, or average "
                "p.grad; for trainings that have nothing to do with each other, pass "
                "llqr.Optimizer a process_group with this process alone"
            )
        return math.isfinite(high)

    def _refuse_join(self) -> None:
        """Raise inside ``join``, where a process without data answers the wrapper's calls alone."""
        if self._wrapper is None:
            return
        config = getattr(self._wrapper, "_join_config", None)
        if config is not None and config.enable:
            raise RuntimeError(
                "DistributedDataParallel.join is not supported: a process that has run out of data "
                "would not take part in what llqr sends; let all make the same number of steps, "
                "for example with drop_last=True in the DistributedSampler"
            )

    def check_replicas(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise where the processes hold different parameters."""
        self._refuse_join()
        if self.size == 1 or self.sharded:
            return
        parts = split_by_device(parameters, lambda p: p)
        norms = [torch._foreach_norm([widen(p.detach()) for p in part.values()]) for part in parts]
        low, high = self.range(sum(float(torch.stack(some).sum()) for some in norms))
        if low != high:
            raise RuntimeError(
                f"refresh: the {self.size} processes hold different parameters (sums of norms from "
                f"{low} to {high}): wrap the model in DistributedDataParallel before the first "
                "step; for trainings that have nothing to do with each other, pass llqr.Optimizer "
                "a process_group with this process alone"
            )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Raise in every process when the body raises in one, so that none waits for the others."""
        try:
            yield
        except Exception:
            self.all(False)
            raise
        if not self.all(True):
            raise RuntimeError(f"{what} failed in another process; its own error says why")

    # -- the DistributedDataParallel wrapper ---------------------------------------------------

    def no_gradient_sync(self, skip: bool = True) -> AbstractContextManager[None]:
        """Keep the gradients of the body's backwards in this process (``no_sync`` of torch)."""
        if self._wrapper is None or not skip:
            return AS_IT_IS
        return self._wrapper.no_sync()  # type: ignore[no-any-return]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Call the module inside the wrapper, with its first process's buffers.

        What the body differentiates by ``torch.autograd.grad`` is of this process alone, and the
        wrapper's reducer learns nothing of it.
        """
        wrapper = self._wrapper
        if wrapper is None or self.size == 1:
            yield
            return
        if wrapper.broadcast_buffers:
            for buffer in wrapper.module.buffers():
                dist.broadcast(buffer, group=wrapper.process_group, group_src=0)
        wrapper.forward = _direct(wrapper)
        try:
            yield
        finally:
            del wrapper.forward


def _data_parallel(model: Any) -> Any:
    """Return the DistributedDataParallel wrapper of a model, also inside torch.compile's."""
    while isinstance(model, nn.Module):
        if isinstance(model, DistributedDataParallel):
            return model
        model = getattr(model, "_orig_mod", None)
    return None


def _direct(wrapper: DistributedDataParallel) -> Callable[..., Any]:
    """Return a forward of the module inside, inputs moved to its device as the wrapper does."""

    def forward(*inputs: Any, **options: Any) -> Any:
        if wrapper.device_ids:
            device = torch.device(wrapper.device_type, wrapper.device_ids[0])
            inputs, options = pytree.tree_map_only(
                Tensor, lambda t: t.to(device), (inputs, options)
            )
        return wrapper.module(*inputs, **options)

    return forward


def _are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether all entries are finite, mostly from their sum, which none that is not leaves."""
    own = local_all(tensors.values())
    one_place = len(set(map(DEVICE, own))) == 1
    if one_place and own[0].is_cpu and math.isfinite(_sum_on_cpu(own)):
        return True
    return math.isfinite(_largest(tensors))  # a sum may also leave the range


def _sum_on_cpu(tensors: list[Tensor]) -> float:
    """Return the sum of all entries, with a call for the short tensors together."""
    if sum(map(Tensor.numel, tensors)) <= SHORT:
        return float(flatten(tensors).detach().sum())
    return float(sum(torch.stack([t.detach().sum() for t in join_short(tensors)]).tolist()))


def _largest(tensors: Mapping[str, Tensor]) -> float:
    """Return the largest absolute entry (NaN where there is one)."""
    own = zip(tensors, local_all(tensors.values()), strict=True)
    filled = {name: t for name, t in own if t.numel()}
    if not filled:
        return 0.0
    ends = compute_per_device(_largest_on_one_device, filled, lambda t: t)
    # torch's maximum, since Python's loses a NaN.
    return ends[0] if len(ends) == 1 else float(torch.tensor(ends).max())


def _largest_on_one_device(named: Mapping[str, Tensor]) -> float:
    tensors = list(named.values())
    if tensors[0].device.type != "cpu":
        return float(torch.stack(torch._foreach_norm(tensors, ord=float("inf"))).max())
    # The fused norm is 20 times slower there than this. Short tensors cost their calls.
    with torch.no_grad():
        found = [end for t in join_short(tensors) for end in torch.aminmax(t)]
        ends = torch.stack(found).tolist()
    # A NaN is both ends of its tensor, and unequal to itself.
    return max(map(abs, ends)) if all(map(eq, ends, ends)) else math.nan
