"""What is measured on: the batches of all processes, the parameters, and nothing left behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from .._autocast import autocast_off
from .._checks import check_integer, short_repr
from .._module_state import ForwardState, TensorValues, WrittenParameters
from .._random_state import RandomState
from .._refresher import call_and_unpack
from .._step_modules import modules_named_in
from .._warnings import warn_caller
from ..distributed import Ranks
from ..distributed._sharded import is_sharded

__all__ = [
    "Data",
    "Forward",
    "Forwards",
    "Parameters",
    "Progress",
    "generator_of",
    "measuring",
]

#: A function of a batch, or without arguments; it returns the loss or (loss, outputs).
Forward = Callable[..., Any]
Forwards = Forward | Sequence[Forward]
Parameters = nn.Module | Iterable[Tensor]
#: Called with how much is done, and of how much.
Progress = Callable[[int, int], None]


class Data:
    """The batches and the parameters of one measurement.

    Flat vectors are the parameters that require grad, one behind the other, in float32 or float64.

    Attributes:
        forwards: a function without arguments for each batch of this process.
        shares: how much each counts, (B,), in float64 on the CPU; they sum to one over all
            processes.
        batches: how many there are in all processes.
        examples: rows of all batches in all processes, if these are known.
        parameters: those that were given.
        active: those among them that require grad.
        dimension: the length of flat vectors.
        ranks: the processes.
    """

    def __init__(
        self,
        forwards: list[Forward],
        weights: list[float],
        examples: int | None,
        parameters: list[Tensor],
        ranks: Ranks,
    ) -> None:
        self.forwards, self.ranks = forwards, ranks
        self.parameters = parameters
        self.active = [p for p in parameters if p.requires_grad]
        self._sizes = [p.numel() for p in self.active]
        self.dimension = sum(self._sizes)
        self.device = self.active[0].device
        double = any(p.dtype == torch.float64 for p in self.active)
        self.dtype = torch.float64 if double else torch.float32
        raw = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.shares = raw / ranks.sum(float(raw.sum()))
        self.batches = int(ranks.sum(len(forwards)))
        known = ranks.all(examples is not None)
        self.examples = int(ranks.sum(examples or 0)) if known else None

    # -- flat vectors --------------------------------------------------------------------------

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Return one tensor per active parameter as a flat vector; None is zero."""
        return torch.cat(
            [
                torch.zeros(n, dtype=self.dtype, device=self.device)
                if t is None
                else t.detach().reshape(-1).to(self.device, self.dtype)
                for t, n in zip(tensors, self._sizes, strict=True)
            ]
        )

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """Return a flat vector as one tensor per active parameter, views where possible."""
        parts = torch.split(v, self._sizes)
        return [t.view(p.shape).to(p.device) for t, p in zip(parts, self.active, strict=True)]

    def spread(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return a flat vector as one tensor per given parameter, zeros for those frozen."""
        known = {id(p): t for p, t in zip(self.active, self.unflatten(v), strict=True)}
        return tuple(known.get(id(p), torch.zeros_like(p).detach()) for p in self.parameters)

    def random_vector(self, generator: torch.Generator, signs: bool = False) -> Tensor:
        """Return a Gaussian flat vector, or one of random signs: the same in all processes."""
        if signs:
            v = torch.randint(2, (self.dimension,), generator=generator, device="cpu") * 2 - 1
        else:
            v = torch.randn(self.dimension, generator=generator, dtype=self.dtype, device="cpu")
        return v.to(self.device, self.dtype)

    # -- over the batches ----------------------------------------------------------------------

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all batches of (B, ...), each counted by its share."""
        return self._sum(torch.tensordot(self.shares, values, 1))

    def standard_error(self, values: Tensor) -> Tensor | None:
        """Return the standard error of that mean between the batches; None with only one."""
        if self.batches < 2:
            return None
        # sum_b share_b^2 (x_b - mean)^2 n / (n - 1): s^2 / n if all count equally
        spread = (values - self.mean(values)).square()
        total = self._sum(torch.tensordot(self.shares.square(), spread, 1))
        return (total * self.batches / (self.batches - 1)).sqrt()

    def _sum(self, values: Tensor) -> Tensor:
        """Add up host numbers over the processes."""
        if self.ranks.size == 1:
            return values
        whole = values.to(self.ranks.device)
        return self.ranks.sum_(whole.contiguous()).to(values)


@contextmanager
def measuring(
    forward: Forwards,
    parameters: Parameters,
    batches: Iterable[Any] | None,
    weights: Sequence[float] | None,
    process_group: dist.ProcessGroup | None,
    rows: int | None = None,
) -> Iterator[Data]:
    """Prepare a measurement; afterwards weights, buffers and random state are as before.

    Args:
        forward: a function of a batch; without ``batches`` one without arguments, or a list.
        parameters: a module, or tensors.
        batches: read once, and kept.
        weights: how much each batch counts; None: by its rows, if they are known.
        process_group: the processes that measure together; None: those of the model.
        rows: cut the batches into ones of so many rows.
    """
    functions = _as_functions(forward, batches)
    tensors = _checked_parameters(parameters)
    modules = _modules_of(functions, parameters)
    held = {id(p) for p in tensors}
    others = [p for m in modules for p in m.parameters(recurse=False) if id(p) not in held]
    values = WrittenParameters().values_of(others, "measurement", tensors)
    start = ForwardState(modules, values)
    weights_before = TensorValues(tensors)
    random = RandomState(*{p.device for p in tensors})
    told: list[str] = []
    ranks = _ranks_of(modules, tensors, process_group)
    try:
        with ranks.bypassed(), autocast_off(tensors[0].device, partial(_warn_of_autocast, told)):
            with ranks.together("reading the batches"):
                calls, counts = _read_batches(functions, batches, rows)
                amounts = _weights_of(weights, counts, len(calls))
            known = None if None in counts else sum(n for n in counts if n is not None)
            forwards: list[Forward] = [
                partial(_call_from, start, partial(call_and_unpack, f)) for f in calls
            ]
            yield Data(forwards, amounts, known, tensors, ranks)
    finally:
        weights_before.restore()
        start.learn()
        start.restore()
        random.restore()


def _warn_of_autocast(told: list[str]) -> None:
    """Say once that the forward's own autocast was switched off."""
    if not told:
        told.append(
            "the forward's autocast is switched off while its sharpness is measured: curvature "
            "products in low precision are wrong in the third digit, and so are small rises"
        )
        warn_caller(told[0])


def _call_from(start: ForwardState, forward: Forward) -> Any:
    """Call a forward with the buffers of the start: all calls are of the same function."""
    start.restore()
    return forward()


def generator_of(seed: int) -> torch.Generator:
    """Return a generator on the CPU: all processes and devices draw the same from it."""
    check_integer("seed", seed, low=0)
    return torch.Generator("cpu").manual_seed(seed)


def _as_functions(forward: Any, batches: Iterable[Any] | None) -> list[Forward]:
    several = isinstance(forward, Sequence)
    functions = list(forward) if several else [forward]
    if not functions or not all(callable(f) for f in functions):
        wrong = next((f for f in functions if not callable(f)), forward)
        raise TypeError(
            "forward: expected a function of a batch with batches=..., a function without "
            f"arguments, or a list of such functions, got {short_repr(wrong)}; the loss has to be "
            "computed anew, so pass lambda: criterion(model(x), y) and not its result"
        )
    if several and batches is not None:
        raise TypeError("batches: with them forward is one function of a batch, not a list")
    for function in functions:
        _check_signature(function, with_batch=batches is not None)
    return functions


def _check_signature(function: Forward, with_batch: bool) -> None:
    """Refuse a forward that cannot be called in the way it will be."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions
        return
    try:
        signature.bind(*([None] if with_batch else []))
    except TypeError as error:
        if with_batch:
            remedy = "with batches it is called with one batch: take it apart inside"
        else:
            remedy = "without batches it is called without arguments: pass batches=[...] too"
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"forward: {name}{signature} does not fit ({error}); {remedy}") from None


def _checked_parameters(parameters: Any) -> list[Tensor]:
    """Return the parameters as a list, each once."""
    remedy = "pass the model, or a list of its parameters, as the second argument"
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters: expected a module or a list of tensors, got "
            f"{short_repr(parameters)}; {remedy}"
        )
    tensors = list(parameters)
    for i, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"parameters: number {i} is {short_repr(p)}, expected a tensor; {remedy}"
            )
        if is_sharded(p):
            raise ValueError(
                "parameters: those of fully_shard are not supported; measure on a model that is "
                "not sharded, with the weights of a full state dict"
            )
        if not p.is_floating_point():
            raise ValueError(f"parameters: number {i} has dtype {p.dtype}, expected a real one")
        if any(p is other for other in tensors[:i]):
            raise ValueError(
                f"parameters: number {i} is given twice; tied weights are one tensor (as "
                "model.parameters() has them)"
            )
    if not any(p.requires_grad and p.numel() for p in tensors):
        raise ValueError(
            f"parameters: none of them requires grad, so there is nothing to measure; {remedy}"
        )
    return tensors


def _modules_of(functions: Sequence[Forward], parameters: Parameters) -> list[nn.Module]:
    """Return the modules that the forwards name, and what is inside them."""
    roots = [module for f in functions for module in modules_named_in(f)]
    if isinstance(parameters, nn.Module):
        roots.append(parameters)
    return list({id(m): m for root in roots for m in root.modules()}.values())


class _Held(nn.Module):
    """Parameters without a model, as Ranks asks for them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter(self._tensors)


def _ranks_of(
    modules: list[nn.Module], tensors: list[Tensor], group: dist.ProcessGroup | None
) -> Ranks:
    wrappers = (m for m in modules if isinstance(m, DistributedDataParallel))
    return Ranks(next(wrappers, None) or _Held(tensors), group)


def _read_batches(
    functions: list[Forward], batches: Iterable[Any] | None, rows: int | None
) -> tuple[list[Forward], list[int | None]]:
    """Return a function without arguments for each batch, and the rows of each."""
    if batches is None:
        if rows is not None:
            raise ValueError("m: sub-batches can only be cut from batches; pass batches=...")
        return functions, [None] * len(functions)
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: expected a list of batches or a DataLoader, got {short_repr(batches)}; one "
            "batch goes in a list, [batch]"
        )
    kept = list(batches)
    if not kept:
        raise ValueError("batches: there is none; pass at least one (in every process)")
    if rows is not None:
        kept = [part for batch in kept for part in _cut(batch, rows)]
        if not kept:
            raise ValueError(f"m: no batch has {rows} rows; pass larger batches or a smaller m")
    return [partial(functions[0], batch) for batch in kept], [_rows_of(b) for b in kept]


def _leaves(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch that have rows."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    found = pytree.tree_leaves(batch)
    return [t for t in found if isinstance(t, Tensor) and t.dim() > 0]


def _rows_of(batch: Any) -> int | None:
    """Return the rows of a batch: the length of its first tensor."""
    leaves = _leaves(batch)
    return len(leaves[0]) if leaves else None


def _cut(batch: Any, rows: int) -> list[Any]:
    """Return the parts of a batch that have exactly so many rows."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    lengths = {len(t) for t in _leaves(batch)}
    if len(lengths) != 1:
        raise ValueError(
            f"m: the tensors of a batch have {sorted(lengths)} rows, so it cannot be cut; pass "
            "batches of m rows and m=None"
        )

    def part(start: int) -> Any:
        return pytree.tree_map_only(
            Tensor, lambda t: t[start : start + rows] if t.dim() else t, batch
        )

    return [part(start) for start in range(0, max(lengths) - rows + 1, rows)]


def _weights_of(
    weights: Sequence[float] | None, counts: list[int | None], many: int
) -> list[float]:
    if weights is None:
        if None in counts:
            return [1.0] * many
        return [float(n) for n in counts if n is not None]
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise TypeError(
            f"weights: expected {many} numbers, one per batch, got {short_repr(weights)}"
        ) from None
    if len(values) != many:
        raise ValueError(f"weights: expected {many} numbers, one per batch, got {len(values)}")
    if not (all(w >= 0 for w in values) and 0 < sum(values) < float("inf")):
        raise ValueError(f"weights: expected numbers >= 0 with a positive sum, got {values}")
    return values
