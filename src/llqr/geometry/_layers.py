"""From parameters to layers, matrix views, blocks and one flat vector.

Only :class:`Layout` knows names, leaves and blocks. Everything behind it (structures, solver) sees
flat vectors and groups of equal blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..curvature._rows import dots, dots_of_runs
from ..distributed import Ranks
from ..distributed._sharded import is_sharded, local, rows_of, sharded_like
from ._modules import matrix_shape
from ._pieces import ELEMENTWISE, Block, Group, Piece, Plan, View, grouped
from ._shares import share_out

__all__ = ["Layout"]

STRUCTURES = ("identity", "scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense")
KRONECKER = ("diag-kfac", "kfac", "e-kfac")


StructureOf = Callable[[str, Tensor], str]


class Layout:
    """The one flat order of all gradient entries, grouped by structure and block shape.

    Args:
        parameters: names to tensors (also on the meta device), in model order.
        layers: parameter name to layer name.
        structure_of: (name, parameter) to a structure name; one structure a layer for
            "scalar", "diagonal" and "dense", which act on whole layers.
        block_size: largest side of a Kronecker or dense block; wider ones are cut. None: whole.
        transposed: names whose matrix view puts the second dimension first.
        ranks: processes that share the blocks out: the flat vectors of each hold its share alone,
            and ``dot`` and ``gram`` add up all of them. None: every process holds everything.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layers: Mapping[str, str],
        structure_of: StructureOf,
        block_size: int | None,
        transposed: set[str] | frozenset[str] = frozenset(),
        ranks: Ranks | None = None,
    ) -> None:
        self.block_size, self.ranks = block_size, ranks
        self.structures: dict[str, str] = {}
        self.views = {
            name: View(
                tuple(p.shape), matrix_shape(p.shape, name in transposed), name in transposed
            )
            for name, p in parameters.items()
        }
        self.dtypes = {name: p.dtype for name, p in parameters.items()}
        wide = {name: _state_dtype(p) for name, p in parameters.items()}
        self.dtype = max(wide.values(), key=lambda t: t.itemsize, default=torch.float32)
        # What an inner product over gradients and curvature products loses to rounding, relative to
        # the norms: its own sums, or the coarsest parameter's arithmetic.
        coarsest = max((torch.finfo(p.dtype).eps for p in parameters.values()), default=0.0)
        self.rounding = max(32 * torch.finfo(self.dtype).eps, 2 * coarsest)
        members: dict[tuple[str, str], list[str]] = {}
        for name, parameter in parameters.items():
            structure = structure_of(name, parameter)
            if structure not in STRUCTURES:
                raise ValueError(
                    f"structure: expected one of {', '.join(STRUCTURES)}, got {structure!r} "
                    f"for parameter {name!r}"
                )
            self.structures[name] = structure
            members.setdefault((layers[name], structure), []).append(name)
        plans: list[Plan] = []
        numbers = {name: count() for name in parameters}
        for (layer, structure), names in members.items():
            for kind, shape, block in self._blocks(layer, structure, names):
                number = next(numbers[block.pieces[0].name])
                block = replace(block, number=number, leaf=len(plans))
                dtype = max((wide[p.name] for p in block.pieces), key=lambda t: t.itemsize)
                plans.append(Plan(kind, shape, dtype, block))
        self.layers = list(dict.fromkeys(plan.block.layer for plan in plans))
        self.kinds = list(dict.fromkeys(plan[:3] for plan in plans))
        self.leaves = len(plans)
        self._shared_out(plans, parameters)

    def _shared_out(self, plans: list[Plan], parameters: Mapping[str, Tensor]) -> None:
        """Give every block its place: of this process in its flat vector, of all in the joined."""
        size, rank = (1, 0) if self.ranks is None else (self.ranks.size, self.ranks.rank)
        spans = {name: _spans(p, size) for name, p in parameters.items()}
        shares = [plans]
        if self.ranks is not None:
            shares = share_out(plans, size, lambda name, r: spans[name][r])
        held = [grouped(share) for share in shares]
        self.groups: list[Group] = held[rank]
        self._runs = [run for group in self.groups for run in group.runs]
        sizes = [sum(group.numel for group in groups) for groups in held]
        #: Of this process's share, and of the longest one; in the joined vector each takes as much.
        self.numel, self.width = sizes[rank], max(sizes)
        self._own: dict[str, list[tuple[Piece, int]]] = {name: [] for name in parameters}
        self._all: dict[str, list[tuple[Piece, int]]] = {name: [] for name in parameters}
        for number, groups in enumerate(held):
            for group in groups:
                for piece, offset in group.places:
                    start = group.start + offset
                    self._all[piece.name].append((piece, number * self.width + start))
                    if number == rank:
                        self._own[piece.name].append((piece, start))
        self._own_leaves = [block.leaf for group in self.groups for block in group.blocks]

    def _blocks(
        self, layer: str, structure: str, names: list[str]
    ) -> list[tuple[str, tuple[int, ...] | None, Block]]:
        """Cut one layer into blocks: (structure, block shape or None, block)."""
        whole = [Piece(n, None, (0, math.prod(self.views[n].shape))) for n in names]
        whole = [piece for piece in whole if piece.numel]  # a parameter may have no entries
        if not whole:
            return []
        if structure in ("identity", "scalar", "diagonal"):
            return [(structure, None, Block(layer, tuple(whole)))]
        if structure == "dense":
            return [
                (structure, (block.numel,), block)
                for block in _cut_runs(layer, whole, self.block_size)
            ]
        blocks: list[tuple[str, tuple[int, ...] | None, Block]] = []
        for piece in whole:
            name = piece.name
            matrix = self.views[name].matrix
            if matrix is None:  # 1-D parameters are elementwise, each with its own leaf
                blocks.append(("vector", None, Block(layer, (piece,))))
                continue
            for rows in _chunks(matrix[0], self.block_size):
                for columns in _chunks(matrix[1], self.block_size):
                    part = Piece(name, rows, columns)
                    blocks.append((structure, part.shape, Block(layer, (part,))))
        return blocks

    def pack(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Gather tensors shaped like the parameters into a new flat vector (missing ones: 0)."""
        return self._fill(self.numel, self._own, tensors)

    def pack_all(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Gather them for all processes: the padded vectors of each, one behind the other."""
        if self.ranks is None:
            return self.pack(tensors)
        return self._fill(self.width * self.ranks.size, self._all, tensors)

    def own(self, joined: Tensor) -> Tensor:
        """Return this process's flat vector out of the joined one."""
        if self.ranks is None:
            return joined
        start = self.ranks.rank * self.width
        return joined[start : start + self.numel].clone()

    def _fill(
        self,
        numel: int,
        places: Mapping[str, list[tuple[Piece, int]]],
        tensors: Mapping[str, Tensor | None],
    ) -> Tensor:
        device = next((t.device for t in tensors.values() if t is not None), torch.device("cpu"))
        make = torch.empty if self.ranks is None else torch.zeros
        flat = make(numel, dtype=self.dtype, device=device)
        targets, sources = [], []
        for name, pieces in places.items():
            tensor = tensors.get(name)
            parts = [(p, flat[start : start + p.numel].view(p.shape)) for p, start in pieces]
            if tensor is None:
                for _, target in parts:
                    target.zero_()
            elif is_sharded(tensor):
                self._fill_from_shards(name, tensor, parts)
            else:
                targets += [target for _, target in parts]
                sources += [piece.of(tensor, self.views[name]) for piece, _ in parts]
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat

    def gather(self, group: Group, tensors: Mapping[str, Tensor | None], out: Tensor) -> None:
        """Write a group's part of the flat vector (missing tensors: 0)."""
        targets, sources = [], []
        for piece, start in group.places:
            tensor, target = tensors.get(piece.name), out[start : start + piece.numel]
            if tensor is None:
                target.zero_()
                continue
            targets.append(target.view(piece.shape))
            sources.append(piece.of(tensor, self.views[piece.name]))
        if targets:
            torch._foreach_copy_(targets, sources)

    def _fill_from_shards(
        self, name: str, tensor: Any, parts: Sequence[tuple[Piece, Tensor]]
    ) -> None:
        """Copy from a sharded tensor: its own rows, or all of them, one parameter at a time."""
        if self._elementwise(name):
            for _, target in parts:
                target.copy_(local(tensor).reshape(-1))
            return
        whole = tensor.full_tensor()
        for piece, target in parts:
            target.copy_(piece.of(whole, self.views[name]))

    def _elementwise(self, name: str) -> bool:
        structure = self.structures[name]
        return structure in ELEMENTWISE or (
            structure in KRONECKER and self.views[name].matrix is None
        )

    def unpack(self, flat: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters; they may share the memory of ``flat``."""
        joined = flat if self.ranks is None else self.ranks.join(flat, self.width)
        places = self._all
        return {
            name: self.join(name, [joined[a : a + piece.numel] for piece, a in places[name]], flat)
            for name in (places if names is None else names)
        }

    def unpack_like(self, flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters, sharded as those of ``like`` are."""
        if not any(is_sharded(t) for t in like.values()):
            return self.unpack(flat, list(like))
        return {name: self._into_shards(name, flat, tensor) for name, tensor in like.items()}

    def _into_shards(self, name: str, flat: Tensor, like: Tensor) -> Tensor:
        """Return one parameter's part of the flat vectors, as rows in each process."""
        assert self.ranks is not None
        parts = [(p, flat[start : start + p.numel].view(p.shape)) for p, start in self._own[name]]
        if self._elementwise(name):
            return sharded_like(parts[0][1] if parts else flat[:0], like)
        view = self.views[name]
        kronecker = self.structures[name] in KRONECKER
        whole = flat.new_zeros(view.matrix if kronecker and view.matrix else math.prod(view.shape))
        for piece, part in parts:
            columns = slice(*piece.columns)
            whole[columns if piece.rows is None else (slice(*piece.rows), columns)] = part
        self.ranks.sum_(whole)
        full = view.write(whole) if kronecker else whole.view(view.shape)
        first, last = rows_of(view.shape, self.ranks.rank, self.ranks.size)
        return sharded_like(full[first:last], like)

    def join(self, name: str, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put a parameter together from its pieces, flat and in the order of the layout."""
        view, pieces = self.views[name], self.pieces(name)
        if not pieces:
            return like.new_empty(view.shape)
        if pieces[0].rows is None:
            ordered = sorted(zip(pieces, parts, strict=True), key=lambda x: x[0].columns)
            runs = [part for _, part in ordered]
            return (runs[0] if len(runs) == 1 else torch.cat(runs)).reshape(view.shape)
        assert view.matrix is not None
        if len(pieces) == 1:
            return view.write(parts[0].view(view.matrix))
        matrix = parts[0].new_empty(view.matrix)
        for piece, part in zip(pieces, parts, strict=True):
            assert piece.rows is not None
            matrix[slice(*piece.rows), slice(*piece.columns)] = part.view(piece.shape)
        return view.write(matrix)

    def pieces(self, name: str) -> list[Piece]:
        """Return the pieces that a parameter was cut into."""
        return [piece for piece, _ in self._all[name]]

    # -- numbers of the whole, where the vectors are a share -------------------------------------

    def sum(self, x: Tensor) -> Tensor:
        """Add up over the processes that share the blocks out (in place)."""
        return x if self.ranks is None else self.ranks.sum_(x)

    def all(self, good: bool) -> bool:
        """Tell whether something holds in every process."""
        return good if self.ranks is None else self.ranks.all(good)

    def widest(self, spectrum: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalues of each layer in any process, in order."""
        if self.ranks is None:
            return {layer: spectrum[layer] for layer in self.layers if layer in spectrum}
        nothing = (math.inf, -math.inf)
        ends = [spectrum.get(layer, nothing) for layer in self.layers]
        return dict(zip(self.layers, self.ranks.ranges(ends), strict=True))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of two flat vectors, or of a matrix's rows with one."""
        return self.sum(dots(a, b))

    def gram(self, rows: Tensor, b: Tensor) -> Tensor:
        """Return each leaf's share of the inner products of (k, P) rows with b: (leaves, k)."""
        parts, start = [rows.new_zeros(0, len(rows), dtype=torch.float64)], 0
        for many, length in self._runs:
            stop = start + many * length
            parts.append(dots_of_runs(rows[:, start:stop], b[start:stop], length))
            start = stop
        return self.per_leaf(torch.cat(parts))

    def per_leaf(self, values: Tensor) -> Tensor:
        """Add up the values of this process's blocks over all that share a leaf."""
        if self.ranks is None:
            return values
        whole = values.new_zeros(self.leaves, *values.shape[1:])
        whole[self._own_leaves] = values
        return self.ranks.sum_(whole)

    def combine(self, coefficients: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add to ``out`` the rows with coefficients of each leaf, (leaves, k) and (k, P)."""
        if self.ranks is not None:
            coefficients = coefficients[self._own_leaves]
        first = start = 0
        for many, length in self._runs:
            stop, last = start + many * length, first + many
            a, c, v = rows[:, start:stop], coefficients[first:last], out[start:stop]
            if many == 1:
                v.addmv_(a.mT, c[0])
            else:
                a = a.view(len(rows), many, length).transpose(0, 1)
                v.view(many, 1, length).baddbmm_(c[:, None, :], a)
            start, first = stop, last


def _spans(parameter: Tensor, size: int) -> list[tuple[int, int]]:
    """Return the run of flat entries of each process: its rows where the parameter is sharded."""
    shape, numel = tuple(parameter.shape), parameter.numel()
    if numel and is_sharded(parameter):
        inner = numel // shape[0]
        rows = [rows_of(shape, rank, size) for rank in range(size)]
        return [(a * inner, b * inner) for a, b in rows]
    return [rows_of((numel,), rank, size) for rank in range(size)]


def _state_dtype(parameter: Tensor) -> torch.dtype:
    """U is float32, and float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _chunks(size: int, block_size: int | None) -> list[tuple[int, int]]:
    step = size if block_size is None else block_size
    return [(i, min(i + step, size)) for i in range(0, size, max(step, 1))]


def _cut_runs(layer: str, whole: list[Piece], block_size: int | None) -> list[Block]:
    """Cut the concatenation of flat pieces into blocks of at most ``block_size`` entries."""
    size = sum(piece.numel for piece in whole)
    blocks = []
    for low, high in _chunks(size, block_size):
        pieces, offset = [], 0
        for piece in whole:
            a, b = max(low - offset, 0), min(high - offset, piece.numel)
            if a < b:
                pieces.append(Piece(piece.name, None, (a, b)))
            offset += piece.numel
        blocks.append(Block(layer, tuple(pieces)))
    return blocks
