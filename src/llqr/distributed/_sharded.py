"""Parameters that ``fully_shard`` (FSDP2) has cut into rows: reading them, and making them whole.

A process holds its rows of every parameter, as a DTensor. Nothing here imports DTensor or FSDP
before a model uses them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._devices import widest_dtype

__all__ = [
    "any_sharded",
    "fsdp_modules",
    "is_sharded",
    "local",
    "local_all",
    "reshard",
    "rows_of",
    "sharded_like",
    "summed",
    "whole_parameters",
]


#: The classes of tensors that are whole.
WHOLE = frozenset({Tensor, nn.Parameter})


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, of which this process holds a part."""
    kind = type(tensor)
    return kind not in WHOLE and (kind.__name__ == "DTensor" or hasattr(tensor, "_local_tensor"))


def any_sharded(tensors: Collection[Tensor]) -> bool:
    """Tell whether any is; of tensors of torch's own classes without a look at each."""
    return not WHOLE.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_all(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return :func:`local` of each; of tensors of torch's own classes without a look at each."""
    tensors = list(tensors)
    return tensors if WHOLE.issuperset(map(type, tensors)) else [local(t) for t in tensors]


def rows_of(shape: tuple[int, ...], rank: int, size: int) -> tuple[int, int]:
    """Return the rows that ``fully_shard`` gives to a process: chunks of ceil(n / size)."""
    step = -(-shape[0] // size)
    return min(rank * step, shape[0]), min((rank + 1) * step, shape[0])


def sharded_like(rows: Tensor, like: Any) -> Tensor:
    """Return a DTensor placed like ``like`` with these rows in this process."""
    return type(like.detach()).from_local(  # type: ignore[no-any-return]
        rows.reshape(like.to_local().shape),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def summed(scalars: dict[str, float], like: Mapping[str, Any]) -> dict[str, float]:
    """Add up over the processes what each computed from its rows of sharded tensors."""
    names = [n for n in scalars if is_sharded(like[n])]
    if not names:
        return scalars
    own = [scalars[n] for n in names]
    device = local(like[names[0]]).device
    whole = torch.tensor(own, dtype=widest_dtype(device), device=device)
    dist.all_reduce(whole, group=like[names[0]].device_mesh.get_group())
    return {**scalars, **dict(zip(names, whole.tolist(), strict=True))}


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, which may be older than the sharded ones."""
    for module in fsdp_modules(model):
        module.reshard()


@contextmanager
def whole_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Swap whole parameters into a sharded model, as leaves, and keep its FSDP hooks from acting.

    Yields:
        The parameters by name, whole: for a model that is not sharded, the parameters themselves.
    """
    if not any_sharded(parameters.values()):
        yield dict(parameters)
        return
    whole: dict[int, Tensor] = {}
    with ExitStack() as stack:
        fsdp = fsdp_modules(model)
        for module in model.modules():
            if not _suspend_hooks(module, stack) and module in fsdp:
                raise RuntimeError(
                    f"fully_shard of torch {torch.__version__} has no hooks that can be suspended"
                )
            for name, p in module._parameters.items():
                if p is None or not is_sharded(p):
                    continue
                if id(p) not in whole:  # tied weights stay one leaf
                    full = p.detach().full_tensor()  # type: ignore[attr-defined]
                    whole[id(p)] = full.requires_grad_(p.requires_grad)
                stack.callback(module._parameters.__setitem__, name, p)
                module._parameters[name] = whole[id(p)]  # type: ignore[assignment]
        yield {name: whole.get(id(p), p) for name, p in parameters.items()}


def _suspend_hooks(module: nn.Module, stack: ExitStack) -> bool:
    """Take FSDP's forward hooks out of a module, and put them back in order at the end."""
    found = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        kept = dict(hooks)
        ours = [key for key, hook in kept.items() if _is_fsdp(hook)]
        for key in ours:
            del hooks[key]
        if ours:
            stack.callback(hooks.update, kept)
            stack.callback(hooks.clear)  # callbacks run last first
            found = True
    return found


def _is_fsdp(hook: Any) -> bool:
    while hook is not None:
        if type(getattr(hook, "__self__", None)).__name__ == "FSDPState":
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False
