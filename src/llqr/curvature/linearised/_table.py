"""Which torch function is replaced by which operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F

from ._attention import Attention
from ._base import LinearisedOperation
from ._convolution import Convolution
from ._eval_batch_norm import EvalBatchNorm
from ._gelu import Gelu
from ._layer_norm import LayerNorm
from ._linear import Linear
from ._train_batch_norm import TrainBatchNorm

__all__ = ["OPERATIONS"]


def _batch_norm(*args: Any, **kwargs: Any) -> LinearisedOperation | None:
    in_training = TrainBatchNorm.from_call(*args, **kwargs)
    return EvalBatchNorm.from_call(*args, **kwargs) if in_training is None else in_training


#: From a function to what makes its operation from a call's arguments (None: not covered).
OPERATIONS: dict[Any, Callable[..., LinearisedOperation | None]] = {
    F.conv1d: partial(Convolution.from_call, 1),
    F.conv2d: partial(Convolution.from_call, 2),
    F.conv3d: partial(Convolution.from_call, 3),
    F.conv_transpose1d: partial(Convolution.from_transposed_call, 1),
    F.conv_transpose2d: partial(Convolution.from_transposed_call, 2),
    F.conv_transpose3d: partial(Convolution.from_transposed_call, 3),
    F.batch_norm: _batch_norm,
    F.layer_norm: LayerNorm.from_call,
    F.linear: Linear.from_call,
    F.gelu: Gelu.from_call,
    F.scaled_dot_product_attention: Attention.from_call,
}
