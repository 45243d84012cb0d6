"""Batch norm against torch's own double backward, and norms that pass through to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from explicit import F64
from replaced import Net, check, ready

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm 1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "batch_norm 1d of sequences": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "batch_norm 2d": (lambda: nn.BatchNorm2d(4), (3, 4, 3, 2)),
    "batch_norm 3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    "batch_norm not affine": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 3, 2)),
    "batch_norm eps": (lambda: nn.BatchNorm2d(4, eps=0.3), (3, 4, 3, 2)),
    "batch_norm without statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 3, 2),
    ),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    make, shape = NORMS[name]
    check(ready(Net(make(), shape)), torch.randn(shape, dtype=F64))
