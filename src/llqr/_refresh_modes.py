"""The modes of a model's modules in a refresh: dropout is off, and norms see what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .curvature import is_synchronised, synchronised_batch_norm
from .geometry import NormStatistics

__all__ = ["refresh_modes"]


@contextmanager
def refresh_modes(
    model: nn.Module, statistics: NormStatistics, warn_of_running: Callable[[], None]
) -> Iterator[None]:
    """Put all modules of a model into evaluation mode but for norms, and each back to its own.

    An overridden ``train`` or ``eval`` is not called: adapters merge weights in theirs.

    Args:
        model: the network.
        statistics: with "batch", norms that are in training mode stay in it.
        warn_of_running: called if such a norm meets one value per channel, which has no variance,
            and takes its running statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [
        module
        for module, training in modes
        if training and statistics == "batch" and isinstance(module, (_BatchNorm, _InstanceNorm))
    ]
    with ExitStack() as stack:
        try:
            for module, _ in modes:
                module.training = False
            for norm in norms:
                norm.training = True
                stack.enter_context(_batch_statistics(norm, warn_of_running))
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _batch_statistics(norm: nn.Module, warn_of_running: Callable[[], None]) -> Iterator[None]:
    """See to the cases in which torch's own forward would raise an error in a refresh."""
    if is_synchronised(norm):
        attributes = vars(norm)
        own = {name: attributes[name] for name in ("forward",) if name in attributes}
        attributes["forward"] = partial(_synchronised_forward, norm, warn_of_running)
        try:
            yield
        finally:
            del attributes["forward"]
            attributes.update(own)
        return
    if isinstance(norm, _BatchNorm) and getattr(norm, "running_mean", None) is not None:
        choose = partial(_choose_statistics, warn_of_running)
        handle = norm.register_forward_pre_hook(choose, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    yield


def _choose_statistics(
    warn_of_running: Callable[[], None], norm: nn.Module, args: Any, kwargs: Any
) -> None:
    """Set the mode for one call: that of training, unless there is no variance to divide by."""
    x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    norm.training = x is None or x.dim() < 2 or x.numel() != x.shape[1]
    if not norm.training:
        warn_of_running()


def _synchronised_forward(
    norm: nn.SyncBatchNorm, warn_of_running: Callable[[], None], input: Tensor
) -> Tensor:
    norm._check_input_dim(input)
    value = synchronised_batch_norm(norm, input)
    if value is not None:
        return value
    warn_of_running()
    norm.training = False
    try:
        return nn.SyncBatchNorm.forward(norm, input)
    finally:
        norm.training = True
