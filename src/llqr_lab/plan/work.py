"""What a computation does, counted on the meta device by the operations that it calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from llqr.geometry.inner_solve import Allocations

__all__ = ["Work", "answered", "fused_attention", "measure_work"]

aten = torch.ops.aten
#: Operations of a product per byte that it reads or writes, from which its traffic is hidden
#: behind its arithmetic: the ratio of the two rates of a processor.
ARITHMETIC_PER_BYTE = 8
#: Operations that look at a tensor in another way, as views do.
LOOKING = {aten.detach.default, aten._unsafe_view.default}
#: Operations that write all of their first argument without reading it.
OVERWRITING = {aten.copy_, aten.zero_, aten.fill_}


@dataclass(frozen=True)
class Work:
    """What a computation does.

    Attributes:
        flops: floating-point operations of products.
        convolved: of convolutions.
        factored: of QR and Cholesky factorisations.
        moved: bytes that its operations read and write, but for products that compute for longer.
        evaluated: bytes of those that evaluate exponentials and the like, or normalise rows.
        calls: how many operations are called.
        peak: the most bytes that it holds at a time, beside what was there.
        held: bytes that it leaves.
    """

    flops: float = 0.0
    convolved: float = 0.0
    factored: float = 0.0
    moved: float = 0.0
    evaluated: float = 0.0
    calls: float = 0.0
    peak: int = 0
    held: int = 0

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.flops + other.flops,
            self.convolved + other.convolved,
            self.factored + other.factored,
            self.moved + other.moved,
            self.evaluated + other.evaluated,
            self.calls + other.calls,
            max(self.peak, other.peak),
            self.held + other.held,
        )

    def __mul__(self, times: float) -> Work:
        """Again and again."""
        rates = ("flops", "convolved", "factored", "moved", "evaluated", "calls")
        return replace(self, **{name: getattr(self, name) * times for name in rates})

    @property
    def operations(self) -> float:
        """Return the floating-point operations of all kinds."""
        return self.flops + self.convolved + self.factored


class _Traffic(Allocations):
    """Count operations and what they read and write, too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.convolved = self.factored = self.moved = self.evaluated = 0.0
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation; add up its arithmetic, and its tensors unless it only views them."""
        kwargs = kwargs or {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls += 1
        if func.is_view or func in LOOKING:
            return result
        moved, operations = _bytes_moved(func, args, kwargs, result), 0.0
        packet = func._overloadpacket
        if packet in FACTORISATIONS:
            a = args[0]
            cubes = a.shape[:-2].numel() * a.shape[-2] * a.shape[-1] ** 2
            self.factored += FACTORISATIONS[packet] * cubes
        elif formula := flop_registry.get(SAME_PRODUCT.get(packet, packet)):
            operations = float(formula(*args, **kwargs, out_val=result))
            if packet in CONVOLUTIONS:
                self.convolved += operations
            else:
                self.flops += operations
        if packet in EVALUATING:
            self.evaluated += moved
        elif operations < ARITHMETIC_PER_BYTE * moved:
            self.moved += moved
        return result

    def done(self) -> Work:
        """Return what was counted."""
        return Work(
            self.flops,
            self.convolved,
            self.factored,
            self.moved,
            self.evaluated,
            float(self.calls),
            self.peak,
        )


def _bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that one operation reads and writes."""
    touched = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
    moved = sum(map(_bytes_in_memory, touched.values()))
    if func._schema.name.endswith("_") and func._overloadpacket not in OVERWRITING:
        moved += sum(map(_bytes_in_memory, tree_leaves(args[0])))  # read and written
    return moved


def _bytes_in_memory(t: Tensor) -> int:
    """Return the bytes of a tensor; one that is expanded repeats some."""
    if 0 not in t.stride():
        return t.nbytes
    sides = zip(t.shape, t.stride(), strict=True)
    return math.prod(n for n, stride in sides if stride) * t.element_size()


#: Operations of factorisations in terms of rows x columns^2.
FACTORISATIONS = {
    aten.linalg_qr: 8 / 3,  # R by reflections, and Q from them
    aten.linalg_cholesky_ex: 1 / 3,
    aten.linalg_eigh: 9.0,
    aten._linalg_eigh: 9.0,
    aten.linalg_solve_triangular: 1.0,
}
#: What computes for longer than it reads and writes.
EVALUATING = {
    aten.gelu,
    aten.gelu_backward,
    aten.silu,
    aten.silu_backward,
    aten.exp,
    aten.erf,
    aten.log,
    aten.tanh,
    aten.sigmoid,
    aten.pow,
    aten._softmax,
    aten._softmax_backward_data,
    aten._log_softmax,
    aten._log_softmax_backward_data,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
#: What does the arithmetic of an operation that torch has a formula for.
SAME_PRODUCT = {
    aten.addmm_: aten.addmm,
    aten.baddbmm_: aten.baddbmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


class answered(TorchDispatchMode):
    """Answer what a computation asks of tensors without numbers: all is well with them.

    Whether something holds of all entries or whether there is anything, yes; whether any entry is
    wrong, no; and every number that is read is the same.
    """

    def __init__(self, number: float = 0.0, whether_all: Iterable[bool] = ()) -> None:
        """Take what every number is, and the first answers whether something holds of all."""
        super().__init__()
        self._number, self._whether_all = number, iter(whether_all)
        self._answers: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation, or answer it if it reads numbers of the meta device."""
        kwargs = kwargs or {}
        asked = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if asked is not None and func is aten._local_scalar_dense.default:
            return self._answers.get(asked, False if asked.dtype == torch.bool else self._number)
        to = kwargs.get("device")
        if asked is not None and func is aten._to_copy.default and to and to.type == "cpu":
            answer = 0 if asked.dtype == torch.bool else self._number
            return torch.full(asked.shape, answer, dtype=kwargs.get("dtype") or asked.dtype)
        result = func(*args, **kwargs)
        if asked is not None and func is aten.all.default:
            self._answers[result] = next(self._whether_all, True)
        elif asked is not None and func is aten.any.default:
            self._answers[result] = asked.dtype != torch.bool
        return result


class fused_attention(TorchFunctionMode):
    """Let attention keep what torch's fused kernels keep: the meta device takes it apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, or the fused operation in the place of attention."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not args[0].is_meta or args[0].dim() != 4:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given.pop(name) for name in names[:3])
        if k.shape[1] != q.shape[1]:  # heads that share keys
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k,
            v,
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            attn_mask=given.get("attn_mask"),
            scale=given.get("scale"),
        )[0]


def measure_work(compute: Callable[[], object]) -> Work:
    """Run a computation on the meta device and return what it does."""
    with _Traffic() as traffic:
        kept = compute()
        held = traffic.held
    del kept
    return replace(traffic.done(), held=held)
