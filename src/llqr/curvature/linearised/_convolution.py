"""All of torch's convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._base import LinearisedOperation, Values, per_channel

__all__ = ["Convolution", "ConvolutionOptions"]


class ConvolutionOptions(NamedTuple):
    """The last arguments of ``torch.convolution``, in its order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


class Convolution(LinearisedOperation):
    """y = x * w + b: bilinear in (x, w)."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, options: ConvolutionOptions) -> None:
        self.tensors = (x, w, b)
        self.x, self.w = x.detach(), w.detach()
        self.bias_size = None if b is None else [b.shape[0]]
        self.options = options
        self.value = torch.convolution(self.x, self.w, None if b is None else b.detach(), *options)

    @staticmethod
    def from_call(
        dim: int,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Convolution | None:
        """Take the arguments of F.conv1d, 2d or 3d; None for forms not covered."""
        # A padding by name is resolved inside torch; an input without a batch has one dimension
        # less than torch.convolution takes.
        if isinstance(padding, str) or input.dim() != dim + 2:
            return None
        options = ConvolutionOptions(
            stride=_per_dimension(stride, dim),
            padding=_per_dimension(padding, dim),
            dilation=_per_dimension(dilation, dim),
            transposed=False,
            output_padding=[0] * dim,
            groups=groups,
        )
        return Convolution(input, weight, bias, options)

    @staticmethod
    def from_transposed_call(
        dim: int,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Convolution | None:
        """Take the arguments of F.conv_transpose1d, 2d or 3d; None for forms not covered."""
        if input.dim() != dim + 2:
            return None
        options = ConvolutionOptions(
            stride=_per_dimension(stride, dim),
            padding=_per_dimension(padding, dim),
            dilation=_per_dimension(dilation, dim),
            transposed=True,
            output_padding=_per_dimension(output_padding, dim),
            groups=groups,
        )
        return Convolution(input, weight, bias, options)

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return the gradients that torch's own backward computes."""
        grads = torch.ops.aten.convolution_backward(
            g, self.x, self.w, self.bias_size, *self.options, list(needed)
        )
        return tuple(v if n else None for v, n in zip(grads, needed, strict=True))

    def jvp(self, d: Values) -> Tensor | None:
        """Return dx * w + x * dw + db."""
        # Two convolutions; torch's double backward computes four, as if x and w moved as well.
        dx, dw, db = d
        if dw is not None:
            y = torch.convolution(self.x, dw, db, *self.options)
            return y if dx is None else y.add_(torch.convolution(dx, self.w, None, *self.options))
        if dx is not None:
            return torch.convolution(dx, self.w, db, *self.options)
        return None if db is None else per_channel(db, self.value).expand_as(self.value)


def _per_dimension(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))
