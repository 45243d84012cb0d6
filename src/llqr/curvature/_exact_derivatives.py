"""Elementary forms of functions whose higher derivatives are wrong in torch.

torch 2.13 differentiates some backward passes by formulas that take for constants what is not. For
weight norm the second derivative is wrong; for layer norm, batch norm and instance norm with
statistics of their input, and for the logit, the third, which a Hessian asks for if the forward
itself takes a derivative (the residual of a differential equation, forces, inner steps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ._overrides import without_look_for_modes
from .linearised import has_subclass

__all__ = ["ExactDerivatives"]


class ExactDerivatives(TorchFunctionMode):
    """Run such functions in elementary operations, for a Hessian.

    A Gauss-Newton product needs one derivative less, and keeps torch's kernels. So does the Hessian
    of a forward that takes no derivative: whether it does is known when it is over, and if so
    :attr:`wanted_again` asks for one more run.

    Attributes:
        wanted_again: whether a function ran by torch's kernel that should not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self._differentiates = self._ran_fused = self._elementary = False

    @property
    def wanted_again(self) -> bool:
        """Whether the forward, now over, must run again."""
        return self._differentiates and self._ran_fused

    def begin_again(self) -> None:
        """Run in elementary operations from the start."""
        self._ran_fused, self._elementary = False, True

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace one of the functions."""
        kwargs = kwargs or {}
        self._differentiates = self._differentiates or func in _DIFFERENTIATE
        # A tensor subclass with functions of its own does what it likes with the call.
        if has_subclass(types):
            return func(*args, **kwargs)
        if func in _WRITTEN_IN_PYTHON:  # torch leaves the mode out of the body
            with self:
                return without_look_for_modes(func)(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        elementary = _WITH_WRONG_THIRD_DERIVATIVE.get(func)
        if elementary is None:
            return func(*args, **kwargs)
        if self._elementary or _within_transform():
            return elementary(*args, **kwargs)
        self._ran_fused = True
        return func(*args, **kwargs)


def _within_transform() -> bool:
    """Tell whether a ``torch.func`` transform or forward-mode differentiation is on."""
    transformed = torch._C._functorch.maybe_current_level() is not None
    return transformed or forward_ad._current_level >= 0


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _normalised(x, list(range(x.dim() - len(normalized_shape), x.dim())), eps)
    return _scaled_and_shifted(y, weight, bias)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    rest = training, momentum, eps, cudnn_enabled
    if not training:
        return torch.batch_norm(x, weight, bias, running_mean, running_var, *rest)
    if running_mean is not None:  # torch's kernel updates the statistics
        torch.batch_norm(x.detach(), None, None, running_mean, running_var, *rest)
    y = _normalised(x, [0, *range(2, x.dim())], eps)
    return _scaled_and_shifted(y, *_per_channel(x, weight, bias))


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    rest = use_input_stats, momentum, eps, cudnn_enabled
    if not use_input_stats:
        return torch.instance_norm(x, weight, bias, running_mean, running_var, *rest)
    if running_mean is not None:
        torch.instance_norm(x.detach(), None, None, running_mean, running_var, *rest)
    y = _normalised(x, list(range(2, x.dim())), eps)
    return _scaled_and_shifted(y, *_per_channel(x, weight, bias))


def _normalised(x: Tensor, over: list[int], eps: float) -> Tensor:
    centred = x - x.mean(over, keepdim=True)
    return centred * (centred.square().mean(over, keepdim=True) + eps).rsqrt()


def _scaled_and_shifted(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _per_channel(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return [None if v is None else v.view(shape) for v in vectors]


def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return (x / (1 - x)).log()


_DIFFERENTIATE = {torch.autograd.grad, Tensor.backward}

_WRITTEN_IN_PYTHON = {F.layer_norm, F.batch_norm, F.instance_norm, *_DIFFERENTIATE}

_WITH_WRONG_THIRD_DERIVATIVE: dict[Any, Callable[..., Tensor]] = {
    torch.layer_norm: _layer_norm,
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch.logit: _logit,
    torch.special.logit: _logit,
    Tensor.logit: _logit,
}
