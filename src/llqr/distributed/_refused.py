"""Trainings in several processes that llqr takes no part in: what, why, and what to use instead.

Nothing here imports the packages in question: their classes are known by the modules they are from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ._sharded import fsdp_modules, is_sharded

__all__ = ["check_sharding", "hint_of_deepspeed", "refuse_deepspeed_optimizer", "refuse_wrappers"]

WITHOUT_DEEPSPEED = (
    "use DistributedDataParallel, or fully_shard in the place of ZeRO, and give llqr.Optimizer "
    "that model and its torch.optim optimizer"
)
#: DeepSpeed's engines and the optimizers around others'; its FusedAdam and the like are elsewhere.
RUNTIME = "deepspeed.runtime"


def refuse_wrappers(model: nn.Module) -> None:
    """Refuse a model that FSDP1 or DeepSpeed has taken over.

    Raises:
        ValueError: it is inside one of their wrappers, or ZeRO has partitioned its parameters.
    """
    kinds = {type(module) for module in model.modules()}
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in kinds):
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) is not supported: it flattens parameters, so "
            "that layers and their names are lost; use torch.distributed.fsdp.fully_shard"
        )
    engine = next((kind.__name__ for kind in kinds if kind.__module__.startswith(RUNTIME)), None)
    # Stage 3 of ZeRO leaves empty tensors in the model, with an id on each.
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
    if engine or partitioned:
        what = f"{engine} of DeepSpeed" if engine else "a model that DeepSpeed's ZeRO partitioned"
        raise ValueError(
            f"model: {what} is not supported: its backward and step act on flat copies of the "
            f"parameters, so that neither U nor a second pass reaches them; {WITHOUT_DEEPSPEED}"
        )


def refuse_deepspeed_optimizer(base: Any, where: str) -> None:
    """Refuse what ``deepspeed.initialize`` makes of an optimizer; ``deepspeed.ops`` is welcome.

    Raises:
        TypeError: the optimizer is one of those.
    """
    if type(base).__module__.startswith(RUNTIME):
        raise TypeError(
            f"{where}: {type(base).__name__} of DeepSpeed is not supported: it steps flat copies "
            f"of the parameters, which have neither layers nor names; {WITHOUT_DEEPSPEED}"
        )


def hint_of_deepspeed() -> str:
    """Return what else to say of a parameter that is not the model's, if DeepSpeed runs."""
    if "deepspeed" not in sys.modules:
        return ""
    return (
        "; deepspeed.initialize with ZeRO or mixed precision puts flat copies in its place, which "
        f"is not supported: {WITHOUT_DEEPSPEED}"
    )


def check_sharding(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Refuse what is sharded in another way than by ``fully_shard`` over one mesh dimension.

    Raises:
        ValueError: HSDP, tensor parallelism, shards that are not rows, or a model sharded in part.
    """
    sharded = {n: p for n, p in parameters.items() if is_sharded(p)}
    by_fsdp = bool(sharded) and bool(fsdp_modules(model))
    for name, p in sharded.items():
        what = f"model: parameter {name!r} is a DTensor placed {tuple(p.placements)}"
        if p.device_mesh.ndim != 1:
            raise ValueError(
                f"{what} on a mesh of {p.device_mesh.ndim} dimensions (HSDP, or tensor and data "
                "parallelism together), which is not supported: U is cut as the parameters are, "
                "among all processes at once; call fully_shard with a mesh of one dimension"
            )
        if not by_fsdp:
            raise ValueError(
                f"{what}, but fully_shard was not called on the model; tensor parallelism "
                "(parallelize_module) is not supported: a refresh needs whole layers in every "
                "process; use fully_shard, which cuts the parameters as well"
            )
        if [str(placement) for placement in p.placements] not in (["S(0)"], ["Shard(dim=0)"]):
            raise ValueError(
                f"{what}; of fully_shard only its rows, Shard(0), are supported, since U is cut "
                "likewise; leave out shard_placement_fn"
            )
    if sharded and len(sharded) < len(parameters):
        name = next(n for n in parameters if n not in sharded)
        raise ValueError(
            f"model: parameter {name!r} is not sharded, but others are; call fully_shard on the "
            "whole model too"
        )
