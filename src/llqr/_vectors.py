"""Inner products, norms and scaling of tensors and flat vectors: the ground floor of the library.

Lists of tensors are {name: tensor}; flat vectors are 1-D tensors. Sums run over millions of terms,
so how they are added up is decided here, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._devices import (
    SHORT,
    WIDE,
    compute_per_device,
    flatten,
    reads_are_free,
    split_by_device,
    unflatten,
    widen,
    widest_dtype,
)
from .distributed._sharded import any_sharded, is_sharded, local, summed

__all__ = [
    "LazyTensors",
    "Scalar",
    "ScaledTensors",
    "Tensors",
    "are_one_run",
    "copies_of",
    "copy_all",
    "inner_products",
    "scale_tensors",
    "dots",
    "dots_of_runs",
    "former_names",
    "lay_out_like",
    "multiple_of_some",
    "quadratic_value",
    "rescale_each_to_norm",
    "rescale_to_norm",
    "sum_as_double",
    "total_inner_product",
    "total_as_scalar",
    "total_on_device",
    "widen_to_float32",
    "zeros_unless",
]

Tensors = Mapping[str, Tensor]
#: A number, or a tensor without dimensions that stays on the device.
Scalar = float | Tensor
V = TypeVar("V")

#: Below it, products of single entries may have left the range of float32.
TINY = 1e-20
#: The longest sum that is left to one matrix product.
PIECE = 2**8
#: Numbers that are copied to float64 rather than summed in their own precision.
COPIED = 2**16
#: Entries of tensors that are copied side by side.
RUN = 2**24
DEVICE, DTYPE, SHAPE = attrgetter("device"), attrgetter("dtype"), attrgetter("shape")
IS_CPU = attrgetter("is_cpu")
#: New in torch; elsewhere than on a CPU its launches were not counted.
FOREACH_CLONE: Callable[[list[Tensor]], list[Tensor]] | None
FOREACH_CLONE = getattr(torch, "_foreach_clone", None)


def quadratic_value(
    u: Tensor,
    g: Tensor,
    image: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
    length: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Return the quadratic model of the loss at a step, from the image of the step.

    .. math:: J = g^\top u + \tfrac12 u^\top C u

    Equation (9) of the paper with the states :math:`\delta x` eliminated; damping is part of C.

    Args:
        u: the step.
        g: the gradient.
        image: C u, or C u / length.
        dot: the inner product of two vectors.
        length: factor on the image.
        out: a vector to work in, which may be the image.
    """
    # The sum comes before the inner product: near the minimum the two terms of J cancel.
    return dot(u, torch.add(g, image, alpha=0.5 * length, out=out))


# -- lists of tensors ----------------------------------------------------------------------------


def former_names(old: Tensors, new: Tensors) -> dict[str, str]:
    """Map the new name of each tensor to its old one; tensors that are new are left out."""
    names = {id(p): name for name, p in old.items()}
    return {name: names[id(p)] for name, p in new.items() if id(p) in names}


def lay_out_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor in the strides of its parameter, as autograd leaves gradients.

    Fused optimizers walk through memory, and so read entries in another layout in a wrong order.
    """
    if value.stride() == parameter.stride() or is_sharded(value):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def scale_tensors(tensors: Tensors, factors: Mapping[str, float] | Scalar) -> dict[str, Tensor]:
    """Return each tensor times its factor, or all times one."""
    if not tensors:
        return {}
    values: list[Tensor] = list(tensors.values())
    each: Any = factors
    if isinstance(factors, Mapping):
        each = [factors[n] for n in tensors]
    elif isinstance(factors, Tensor):
        each = factors.to(values[0].dtype)  # else foreach goes one by one
    return dict(zip(tensors, torch._foreach_mul(values, each), strict=True))


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name that are looked for when somebody asks.

    Args:
        find: returns them.
    """

    def __init__(self, find: Callable[[], dict[str, Tensor]]) -> None:
        self._find = find

    @cached_property
    def _found(self) -> dict[str, Tensor]:
        return self._find()

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class ScaledTensors(LazyTensors):
    """Tensors times one factor, multiplied out when somebody asks.

    Who adds them to others does not: torch adds multiples, which saves a call and the memory.

    Args:
        tensors: by name.
        factor: of all; a tensor without dimensions is not read.
    """

    def __init__(self, tensors: Tensors, factor: Scalar) -> None:
        super().__init__(lambda: scale_tensors(tensors, factor))
        self.tensors, self.factor = tensors, factor

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def multiple_of_some(tensors: Tensors, names: Iterable[str], factor: Scalar) -> ScaledTensors:
    """Return those of some names, times a factor."""
    if isinstance(tensors, ScaledTensors):
        return multiple_of_some(tensors.tensors, names, tensors.factor * factor)
    return ScaledTensors({n: tensors[n] for n in names}, factor)


def zeros_unless(good: Tensor, tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors if a flag on the device is true, else zeros, whatever they hold.

    Args:
        good: without dimensions; not read.
        tensors: of one device and dtype.
    """
    if not tensors:
        return {}
    values = list(tensors.values())
    flat = torch.where(good, flatten(values), 0.0)
    return dict(zip(tensors, unflatten(flat, values), strict=True))


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of plain tensors, with a few calls for all of them."""
    if FOREACH_CLONE is not None and tensors and all(map(IS_CPU, tensors)):
        return FOREACH_CLONE(tensors)
    if are_one_run(tensors):  # as those of most networks
        return unflatten(flatten(tensors), tensors)
    copies = list(tensors)
    for places in _places_by_kind(tensors):
        # The copies of a run lie one behind the other in one piece of memory.
        for run in _gather_runs(places, lambda i: tensors[i].numel()):
            originals = [tensors[i] for i in run]
            if len(run) > 1 and all(map(Tensor.is_contiguous, originals)):
                made = unflatten(flatten(originals), originals)
            else:
                made = [torch.empty_like(t) for t in originals]
                torch._foreach_copy_(made, originals)
            for i, copy in zip(run, made, strict=True):
                copies[i] = copy
    return copies


def are_one_run(tensors: list[Tensor]) -> bool:
    """Tell whether tensors are of one device and dtype and few enough to be copied side by side."""
    return (
        len(tensors) > 1
        and sum(map(Tensor.numel, tensors)) <= RUN
        and len(set(map(DTYPE, tensors))) == 1
        and len(set(map(DEVICE, tensors))) == 1
        and all(map(Tensor.is_contiguous, tensors))
    )


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy plain tensors, in one call per device and dtype."""
    if len(set(map(DTYPE, targets))) == len(set(map(DEVICE, targets))) == 1:
        torch._foreach_copy_(targets, sources)
        return
    for places in _places_by_kind(targets):
        torch._foreach_copy_([targets[i] for i in places], [sources[i] for i in places])


def _places_by_kind(tensors: list[Tensor]) -> Iterable[Sequence[int]]:
    """Return the places of the tensors of each device and dtype."""
    places: dict[Any, list[int]] = {}
    for i, kind in enumerate(zip(map(DEVICE, tensors), map(DTYPE, tensors), strict=True)):
        places.setdefault(kind, []).append(i)
    return places.values()


def rescale_to_norm(moved: Tensors, like: Tensors) -> dict[str, Tensor]:
    """Return ``moved`` with the global norm of ``like``."""
    old, new = (math.sqrt(total_inner_product(gs, gs)) for gs in (like, moved))
    return scale_tensors(moved, old / max(new, torch.finfo(torch.float64).tiny))


def rescale_each_to_norm(moved: Tensors, like: Tensors) -> dict[str, Tensor]:
    """Return ``moved``, each tensor with the norm of the one in ``like``."""
    old, new = (inner_products(gs, gs) for gs in (like, moved))
    return scale_tensors(moved, {n: math.sqrt(old[n] / new[n]) if new[n] else 0.0 for n in moved})


def widen_to_float32(gradients: Tensors) -> dict[str, Tensor]:
    """Return gradients in at least float32."""
    if WIDE.issuperset(map(DTYPE, gradients.values())):
        return dict(gradients)
    return {n: g if g.dtype == torch.float64 else g.float() for n, g in gradients.items()}


def inner_products(a: Tensors, b: Tensors) -> dict[str, float]:
    """Return the inner product of each pair of tensors (of sharded ones, over all processes).

    Long ones are taken in float32, since torch's pairwise sums keep seven digits; short ones, and
    those that leave the range of float32, are taken in float64.
    """
    pairs = {n: (local(a[n]), local(b[n])) for n in b}
    if not pairs:
        return {}
    products: dict[str, float] = {}
    for part in compute_per_device(_products_on_one_device, pairs, itemgetter(0)):
        products.update(part)
    return summed({n: products[n] for n in b}, like=b)


def _products_on_one_device(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the inner product of each pair, with one read from the device."""
    short = {n: pair for n, pair in pairs.items() if pair[0].numel() <= SHORT}
    found = dict(zip(short, _dots_in_double(list(short.values())), strict=True))
    for n, (x, y) in pairs.items():
        if n not in found:
            found[n] = (x * y if x.dtype.itemsize >= 4 else x.float() * y.float()).sum()
    products = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    for n, p in products.items():
        if n not in short and not TINY < abs(p) < math.inf:
            products[n] = float(_dots_in_double([pairs[n]])[0])
    return products


def total_inner_product(a: Tensors, b: Tensors) -> float:
    """Return the inner product over all tensors together, and over all shards of each."""
    if not b:
        return 0.0
    ys = list(b.values())
    if any_sharded(ys):
        return sum_as_double(inner_products(a, b))
    xs = ys if a is b else [a[n] for n in b]
    try:
        return _total_on_one_device(xs, ys)
    except RuntimeError:
        # Asked only now, since this runs in every step, mostly on one device.
        parts = split_by_device({n: (a[n], y) for n, y in b.items()}, itemgetter(0))
        if len(parts) < 2:
            raise
    lists = [zip(*part.values(), strict=True) for part in parts]
    return sum(_total_on_one_device(list(x), list(y)) for x, y in lists)


def total_as_scalar(a: Tensors, b: Tensors) -> Scalar:
    """Return the inner product over all tensors: a tensor on the device where a read takes a wait.

    Elsewhere, and of sharded tensors, it is the number of :func:`total_inner_product`.
    """
    ys = list(b.values())
    if any_sharded(ys) or reads_are_free(set(map(DEVICE, ys))):
        return total_inner_product(a, b)
    return total_on_device(a, b)


def total_on_device(a: Tensors, b: Tensors) -> Tensor:
    """Return the inner product over all whole tensors of one device, without a read.

    Nobody can look whether it left the range of float32, so short sums are taken in float64.
    """
    xs, ys = [a[n] for n in b], list(b.values())
    if all(map(is_, xs, ys)):
        return _square_from_norms(xs)
    runs = _gather_runs(list(zip(xs, ys, strict=True)), lambda pair: pair[0].numel())
    short = sum(map(Tensor.numel, ys)) <= RUN
    return torch.stack([_product_of_run(*_sides(run), double=short) for run in runs]).sum()


def _square_from_norms(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares over all tensors, from their norms; nothing is read."""
    norms = torch._foreach_norm(tensors, dtype=widest_dtype(tensors[0].device))
    return torch.stack(norms).square().sum()


def _total_on_one_device(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Return the inner product over all pairs, with one read from the device."""
    cpu = xs[0].is_cpu
    if cpu and sum(map(Tensor.numel, xs)) <= SHORT:
        return float(_product_of_run(xs, ys, double=True))
    if not cpu and all(map(is_, xs, ys)):
        # Norms in one call for all: on a CPU they lose digits of long tensors.
        square = float(_square_from_norms(xs))
        if TINY < square < math.inf:
            return square
    every = list(zip(xs, ys, strict=True))
    short = [pair for pair in every if pair[0].numel() <= SHORT]
    long = [pair for pair in every if pair[0].numel() > SHORT]
    runs = [_sides(run) for run in _gather_runs(long, lambda pair: pair[0].numel())]
    sums = [_product_of_run(*_sides(short), double=True)] if short else []
    sums += [_product_of_run(*run, double=False) for run in runs]
    found = torch.stack(sums).tolist()
    for place, run in enumerate(runs, start=len(found) - len(runs)):
        if not TINY < abs(found[place]) < math.inf:
            found[place] = float(_product_of_run(*run, double=True))
    return math.fsum(found)


def _sides(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the first tensors of some pairs, and the second."""
    return [x for x, _ in pairs], [y for _, y in pairs]


def _gather_runs(items: Iterable[V], numel_of: Callable[[V], int]) -> list[list[V]]:
    """Return the items, in their order, in runs of at most RUN entries or one item."""
    runs: list[list[V]] = []
    room = -1
    for item in items:
        size = numel_of(item)
        if size > room:
            runs.append([])
            room = RUN
        runs[-1].append(item)
        room -= size
    return runs


def _product_of_run(xs: list[Tensor], ys: list[Tensor], *, double: bool) -> Tensor:
    """Return the inner product over some pairs, a scalar in the device's widest dtype."""
    same = all(map(is_, xs, ys))
    x = flatten(xs)
    y = x if same else flatten(ys)
    if double:
        x = widen(x)
        return torch.dot(x, x if same else widen(y))
    if x.dtype.itemsize < 4 or y.dtype.itemsize < 4:
        x, y = x.float(), y.float()
    return widen((x * y).sum())


def sum_as_double(numbers: Mapping[str, float]) -> float:
    """Return the sum of numbers, as torch adds them up in float64."""
    return float(torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu").sum())


def _dots_in_double(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return inner products in float64, with one conversion for all."""
    if not pairs:
        return []
    xs, ys = ([x.reshape(-1) for x in side] for side in zip(*pairs, strict=True))
    sizes = [x.numel() for x in xs]
    left = _split_doubles(xs, sizes)
    right = left if all(y is x for x, y in pairs) else _split_doubles(ys, sizes)
    return [torch.dot(x, y) for x, y in zip(left, right, strict=True)]


def _split_doubles(flat: list[Tensor], sizes: list[int]) -> list[Tensor]:
    return list(torch.split_with_sizes(widen(torch.cat(flat)), sizes))


# -- flat vectors --------------------------------------------------------------------------------


def dots(rows: Tensor, v: Tensor) -> Tensor:
    """Return the inner products of a vector, or of the rows of a matrix, with a vector.

    In float64, where the device has it, and in runs of ``PIECE`` terms: of 5 million terms of one
    sign in float32, torch's dot and GEMV on a CPU get three or four digits right, and a basis
    orthogonalised by those falls apart within ten vectors. In runs it is nine digits, in the same
    time.

    Args:
        rows: (P,) or (k, P).
        v: (P,).

    Returns:
        A scalar or (k,), in the device's widest dtype.
    """
    matrix, whole = rows if rows.dim() == 2 else rows[None], len(v) - len(v) % PIECE
    total = torch.mv(widen(matrix[:, whole:]), widen(v[whole:]))
    if whole:
        total += dots_of_runs(matrix[:, :whole], v[:whole], PIECE).sum(0)
    return total if rows.dim() == 2 else total[0]


def dots_of_runs(rows: Tensor, v: Tensor, length: int) -> Tensor:
    """Return the part that each run of ``length`` entries has in the rows' inner products with v.

    Args:
        rows: (k, P), with P a multiple of ``length``.
        v: (P,).
        length: of a run.

    Returns:
        (P / length, k), in the device's widest dtype.
    """
    many, piece = len(v) // length, _run_divisor(length)
    if piece is None:
        pairs = zip(torch.split(rows, length, 1), torch.split(v, length), strict=True)
        return torch.stack([dots(a, b) for a, b in pairs])
    if piece < length:
        return dots_of_runs(rows, v, piece).view(many, length // piece, len(rows)).sum(1)
    if rows.numel() <= COPIED:
        rows, v = widen(rows), widen(v)
    # The vector as a row: with it as a column, a batch of GEMVs takes five times as long.
    columns = rows.view(len(rows), many, length).permute(1, 2, 0)  # (many, length, k)
    return widen(torch.bmm(v.view(many, 1, length), columns)[:, 0])


@cache
def _run_divisor(length: int) -> int | None:
    """Return the longest divisor of a length that is at most PIECE and not very short."""
    if length <= PIECE:
        return length
    return next((d for d in range(PIECE, PIECE // 16, -1) if length % d == 0), None)
