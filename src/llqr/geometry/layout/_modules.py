"""What the modules of a model say about its parameters: layers, and the matrix that each is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

__all__ = ["layers_of", "matrix_shape", "unwrap_model"]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def layers_of(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """Map every parameter name to its layer, and say which weights are stored input-first.

    One layer is the parameters that one module owns directly. A tied parameter belongs to the
    first module that owns it, as in ``model.named_parameters()``.

    Returns:
        ``{parameter name: layer name}`` and the names of transposed-convolution weights, whose
        output dimension is the second.
    """
    layers: dict[str, str] = {}
    transposed: set[str] = set()
    seen: set[int] = set()
    for layer, module in model.named_modules():
        for last, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied: it belongs to its first module
                continue
            seen.add(id(parameter))
            name = f"{layer}.{last}" if layer else last
            layers[name] = layer
            if isinstance(module, nn.modules.conv._ConvTransposeNd) and parameter.dim() > 2:
                transposed.add(name)
    return layers, transposed


def matrix_shape(shape: Sequence[int], transposed: bool = False) -> tuple[int, int] | None:
    """Return the (rows, columns) in which a parameter is a matrix; None if it is elementwise.

    Leading dimensions of size 1 are dropped while more than two remain, then everything after the
    first is flattened: Linear (out, in), Conv (out, in * kernel), a position table (1, T, d) is
    (T, d), a class token (1, 1, d) is (1, d).
    """
    shape = list(shape)
    if transposed:
        shape[:2] = shape[1::-1]
    # A position table (1, T, d) is (T, d), a class token (1, 1, d) is (1, d).
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) < 2:
        return None
    return shape[0], math.prod(shape[1:])
