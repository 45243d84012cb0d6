"""What the checks share: a batch split over processes, one process beside them, comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import llqr
from tiny import Problem, everything

_alone: dict[int, dist.ProcessGroup] = {}


def alone() -> dist.ProcessGroup:
    """A group of this process alone: what is done with it is done in one process."""
    if 0 not in _alone:
        _alone[0] = dist.new_subgroups(group_size=1)[0]
    return _alone[0]


def one_process(problem: Problem, **options: Any) -> llqr.Optimizer:
    """An optimizer that knows no other process."""
    base = options.pop("base", lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))
    return llqr.Optimizer(
        base(problem.model.parameters()), problem.model, process_group=alone(), **options
    )


def wrapped(problem: Problem, **options: Any) -> Problem:
    """The problem's model in DistributedDataParallel, with this process's share of the batch."""
    rows = len(problem.x) // dist.get_world_size()
    mine = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    model = DistributedDataParallel(problem.model, **options)
    return Problem(model, problem.x[mine], problem.y[mine])


def data_parallel(problem: Problem, **options: Any) -> tuple[llqr.Optimizer, Problem]:
    """An optimizer for the wrapped problem."""
    share = wrapped(problem)
    base = options.pop("base", lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))
    return llqr.Optimizer(base(share.model.parameters()), share.model, **options), share


def two_bases(
    matrices: Callable[[Any], torch.optim.Optimizer], rest: Callable[[Any], torch.optim.Optimizer]
) -> Callable[[Any], list[torch.optim.Optimizer]]:
    """Return a maker of two bases for a model's parameters."""

    def make(parameters: Any) -> list[torch.optim.Optimizer]:
        held = list(parameters)
        return [
            matrices([p for p in held if p.dim() == 2]),
            rest([p for p in held if p.dim() != 2]),
        ]

    return make


def replicas_equal(state: Any, where: str = "") -> None:
    """Assert that a nested structure has the same bits in all processes."""
    if isinstance(state, Tensor):
        parts = [torch.empty_like(state) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, state.detach().contiguous())
        for part in parts:
            assert torch.equal(part, state), f"{where}: differs by {(part - state).abs().max()}"
    elif isinstance(state, dict):
        for key, value in state.items():
            replicas_equal(value, f"{where}/{key}")
    elif isinstance(state, (list, tuple)):
        for i, value in enumerate(state):
            replicas_equal(value, f"{where}/{i}")
    else:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, state)
        assert all(v == state or v != v for v in values), f"{where}: {values}"


def all_equal(optimizer: llqr.Optimizer) -> None:
    """Assert that weights and the whole optimizer state are the same in all processes."""
    state = everything(optimizer)
    parameters = {n: p.detach() for n, p in optimizer.model.named_parameters()}
    replicas_equal({"parameters": parameters, "optimizer": state["optimizer"]})


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights by the names of the module inside."""
    return {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters()}


def near(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Assert that weights agree relative to the largest entry."""
    assert list(a) == list(b), (list(a), list(b))
    for name in a:
        error = float((a[name] - b[name]).abs().max() / b[name].abs().max())
        assert error <= tolerance, f"{name}: {error}"


@contextlib.contextmanager
def raises(kind: type[Exception], *parts: str) -> Iterator[None]:
    """Expect an error whose message holds the parts."""
    try:
        yield
    except kind as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def rank() -> int:
    return dist.get_rank()


Make = Callable[[], Any]
