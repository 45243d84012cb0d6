"""Operations whose second backward costs, in time and memory, what it must.

A Gauss-Newton product differentiates u -> J'u by u alone: the operations' inputs and weights are
constants there. torch's double backward does not know that; for a convolution it computes four
convolutions where two are needed, and for a linear layer it keeps every cotangent. The functions
here have the pair that is needed: a backward that is the vector-Jacobian product, and a backward of
that which is the Jacobian-vector product.

They are wrong for a Hessian, where inputs and weights are not constants, and serve the
Gauss-Newton curvatures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._linearised import Attention, Gelu, Linear, Linearised, Values

__all__ = ["SwappedOps", "is_swapped", "swapped_above"]


class _Apply(torch.autograd.Function):
    """The value; its backward is the vjp."""

    @staticmethod
    def forward(ctx: Any, op: Linearised, *tensors: Tensor | None) -> Tensor:
        ctx.op = op
        # The output's own node must not hold it: such a circle through autograd is never freed.
        value, op.value = op.value, op.value.detach()
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_Vjp.apply(ctx.op, needed, g)  # type: ignore[no-untyped-call]
        return None, *ctx.op.vjp(g, needed)


class _Vjp(torch.autograd.Function):
    """J'g, linear in g; its backward is the jvp."""

    @staticmethod
    def forward(ctx: Any, op: Linearised, needed: tuple[bool, ...], g: Tensor) -> Values:
        ctx.op = op
        ctx.set_materialize_grads(False)
        return op.vjp(g, needed)

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Any, ...]:
        return None, None, ctx.op.jvp(d)


class Convolution(Linearised):
    """y = x * w + b for all of torch's convolutions: bilinear in (x, w)."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, **options: Any) -> None:
        self.tensors = (x, w, b)
        self.x, self.w = x.detach(), w.detach()
        self.bias_size = None if b is None else [b.shape[0]]
        self.options = options
        self.value = self._conv(self.x, self.w, None if b is None else b.detach())

    def _conv(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        o = self.options
        return torch.convolution(
            x,
            w,
            b,
            o["stride"],
            o["padding"],
            o["dilation"],
            o["transposed"],
            o["output_padding"],
            o["groups"],
        )

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return the gradients that torch's own backward computes."""
        o = self.options
        grads = torch.ops.aten.convolution_backward(
            g,
            self.x,
            self.w,
            self.bias_size,
            o["stride"],
            o["padding"],
            o["dilation"],
            o["transposed"],
            o["output_padding"],
            o["groups"],
            list(needed),
        )
        return tuple(v if n else None for v, n in zip(grads, needed, strict=True))

    def jvp(self, d: Values) -> Tensor | None:
        """Return dx * w + x * dw + db."""
        dx, dw, db = d
        if dw is not None:
            y = self._conv(self.x, dw, db)
            return y if dx is None else y.add_(self._conv(dx, self.w, None))
        if dx is not None:
            return self._conv(dx, self.w, db)
        return None if db is None else _channels(db, self.value).expand_as(self.value)


class EvalBatchNorm(Linearised):
    """y = w o (x - mean) / sqrt(var + eps) + b with running statistics: affine in x."""

    def __init__(
        self, x: Tensor, mean: Tensor, var: Tensor, w: Tensor | None, b: Tensor | None, eps: float
    ) -> None:
        self.tensors = (x, w, b)
        scale = torch.rsqrt(var.detach() + eps)
        self.gain = _channels(scale if w is None else scale * w.detach(), x)
        self.shift, self.scale = _channels(mean.detach(), x), _channels(scale, x)
        self.x = x.detach()
        # torch's own kernel, so that the value is the network's bit for bit.
        self.value = F.batch_norm(
            self.x,
            mean.detach(),
            var.detach(),
            None if w is None else w.detach(),
            None if b is None else b.detach(),
            training=False,
            eps=eps,
        )

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return g o gain, and the sums over all but the channels."""
        over = [i for i in range(g.dim()) if i != 1]
        dx = g * self.gain if needed[0] else None
        dw = None
        if needed[1]:
            dw = (g * (self.x - self.shift)).sum(over) * self.scale.reshape(-1)
        db = g.sum(over) if needed[2] else None
        return dx, dw, db

    def jvp(self, d: Values) -> Tensor | None:
        """Return dx o gain + xhat o dw + db."""
        dx, dw, db = d
        gain = None if dx is None else self.gain
        y = None if dx is None or gain is None else dx * gain
        if dw is not None:
            slope = _channels(dw, self.x) * self.scale
            offset = -self.shift * slope
            if db is not None:
                offset, db = offset + _channels(db, self.x), None
            y = torch.addcmul(offset, self.x, slope) if y is None else y.addcmul_(self.x, slope)
            if gain is not None:
                y = y.add_(offset)
        if db is not None:
            y = _channels(db, self.x).expand_as(self.x) if y is None else y + _channels(db, self.x)
        return y


class LayerNorm(Linearised):
    """y = w o xhat + b, with xhat normalised over the last dimensions."""

    def __init__(
        self, x: Tensor, shape: list[int], w: Tensor | None, b: Tensor | None, eps: float
    ) -> None:
        self.tensors = (x, w, b)
        self.x, self.shape = x.detach(), shape
        self.w = None if w is None else w.detach()
        self.b = None if b is None else b.detach()
        self.value, self.mean, self.rstd = torch.native_layer_norm(
            self.x, shape, self.w, self.b, eps
        )

    def vjp(self, g: Tensor, needed: tuple[bool, ...]) -> Values:
        """Return the gradients that torch's own backward computes."""
        grads = torch.ops.aten.native_layer_norm_backward(
            g, self.x, self.shape, self.mean, self.rstd, self.w, self.b, list(needed)
        )
        return tuple(v if n else None for v, n in zip(grads, needed, strict=True))

    def jvp(self, d: Values) -> Tensor | None:
        """Return w o rstd (dx - mean(dx) - xhat mean(xhat o dx)) + xhat o dw + db."""
        dx, dw, db = d
        over = list(range(self.x.dim() - len(self.shape), self.x.dim()))
        xhat = (self.x - self.mean) * self.rstd
        y: Tensor | None = None
        if dx is not None:
            y = dx - dx.mean(over, keepdim=True) - xhat * (xhat * dx).mean(over, keepdim=True)
            y = y.mul_(self.rstd)
            y = y if self.w is None else y.mul_(self.w)
        if dw is not None:
            y = xhat * dw if y is None else y.addcmul_(xhat, dw.expand_as(xhat))
        if db is not None:
            y = db.expand_as(xhat) if y is None else y.add_(db)
        return y


class SwappedOps(TorchFunctionMode):
    """Run the operations of ``_SWAPS`` through the functions above.

    Alive during the one forward of a linearisation. A call that carries no gradient, or that has
    arguments in a form not known here, passes through to torch. So does all within saved-tensor
    hooks of the forward's own, since those may be of activation checkpointing: it runs the forward
    again when this is over, and must meet the same operations.
    """

    def __enter__(self) -> SwappedOps:
        """Begin, and count the saved-tensor hooks that are on."""
        hooks, self._hooks = torch.autograd.graph.saved_tensors_hooks, 0
        enter, leave = self._original = hooks.__enter__, hooks.__exit__

        def entered(hook: Any) -> None:
            self._hooks += 1
            return enter(hook)

        def left(hook: Any, *error: object) -> None:
            self._hooks -= 1
            return leave(hook, *error)

        hooks.__enter__, hooks.__exit__ = entered, left  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        hooks = torch.autograd.graph.saved_tensors_hooks
        hooks.__enter__, hooks.__exit__ = self._original  # type: ignore[method-assign]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the operations that have a better pair of backwards."""
        kwargs = kwargs or {}
        swap = None if self._hooks else _SWAPS.get(func)
        op = None if swap is None else swap(*args, **kwargs)
        if op is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not any(t is not None and t.requires_grad for t in op.tensors):
            return op.value
        return _Apply.apply(op, *op.tensors)  # type: ignore[no-untyped-call]


def is_swapped(node: Any) -> bool:
    """Tell whether a node of a graph is one of the functions here."""
    return isinstance(node, (_Apply._backward_cls, _Vjp._backward_cls))


def swapped_above(loss: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Tell whether a swapped operation stands between the loss and the outputs.

    There the second derivative H of the loss is taken, and the functions here would be wrong.
    """
    below = {z.grad_fn for z in outputs}
    pending, seen = [loss.grad_fn], set(below)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_swapped(node):
            return True
        pending.extend(parent for parent, _ in node.next_functions)
    return False


def _conv(dim: int, transposed: bool) -> Callable[..., Linearised | None]:
    def plain(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Linearised | None:
        if isinstance(padding, str) or input.dim() != dim + 2:
            return None
        return Convolution(
            input,
            weight,
            bias,
            stride=_many(stride, dim),
            padding=_many(padding, dim),
            dilation=_many(dilation, dim),
            transposed=False,
            output_padding=[0] * dim,
            groups=groups,
        )

    def turned(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Linearised | None:
        if input.dim() != dim + 2:
            return None
        return Convolution(
            input,
            weight,
            bias,
            stride=_many(stride, dim),
            padding=_many(padding, dim),
            dilation=_many(dilation, dim),
            transposed=True,
            output_padding=_many(output_padding, dim),
            groups=groups,
        )

    return turned if transposed else plain


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Linearised | None:
    if training or running_mean is None or running_var is None or input.dtype != running_mean.dtype:
        return None
    return EvalBatchNorm(input, running_mean, running_var, weight, bias, eps)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Linearised | None:
    if weight is not None and weight.dtype != input.dtype:
        return None
    return LayerNorm(input, list(normalized_shape), weight, bias, eps)


_SWAPS: dict[Any, Callable[..., Linearised | None]] = {
    F.conv1d: _conv(1, False),
    F.conv2d: _conv(2, False),
    F.conv3d: _conv(3, False),
    F.conv_transpose1d: _conv(1, True),
    F.conv_transpose2d: _conv(2, True),
    F.conv_transpose3d: _conv(3, True),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.linear: Linear.of,
    F.gelu: Gelu.of,
    F.scaled_dot_product_attention: Attention.of,
}


def _many(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value) * (count // len(value))


def _channels(v: Tensor, like: Tensor) -> Tensor:
    """Shape a vector of channels (dimension 1) to broadcast against ``like``."""
    return v.reshape(1, -1, *[1] * (like.dim() - 2))
