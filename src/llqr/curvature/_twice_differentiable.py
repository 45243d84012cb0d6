"""The surroundings of the one forward whose graph is kept and differentiated twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["ExactWeightNorm", "twice_differentiable"]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose kernels that have a double backward, for the duration of one forward.

    Flash and memory-efficient attention, the fast path of ``nn.MultiheadAttention`` in evaluation
    mode and compiled graphs have none: use the math attention, the slow path and eager code.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # set_stance imports the compiler (seconds); if it was never loaded, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


class ExactWeightNorm(TorchFunctionMode):
    """Compute weight norm from elementary operations, for a Hessian.

    torch's fused kernel takes the norms for constants in its second backward, so that its Hessian
    is wrong. A Gauss-Newton product does not need that backward.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace that one function."""
        function = _weight_norm if func is torch._weight_norm else func
        return function(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
