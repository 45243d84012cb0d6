"""The one flat order of all gradient entries, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor

from ..._vectors import DTYPE, SHAPE, Tensors
from ...distributed import Ranks
from ...distributed._sharded import any_sharded, is_sharded, local, rows_of, sharded_like
from ._blocks import (
    Block,
    BlockKind,
    Group,
    MatrixView,
    PlannedBlock,
    Slice,
    group_equal_blocks,
)
from ._flat_space import FlatSpace
from ._modules import matrix_shape
from ._shards import assign_shards

__all__ = ["Layout"]

KindOf = Callable[[str, Tensor], Any]  # a BlockKind; the class of a structure is one


class Layout:
    """The one flat order of all gradient entries, grouped by kind and shape of block.

    Args:
        parameters: names to tensors (also on the meta device), in model order.
        layers: parameter name to layer name.
        kind_of: (name, parameter) to a :class:`BlockKind`.
        vector_kind: the kind of the blocks of 1-D parameters whose kind is cut in rectangles.
        block_size: longest side of a rectangle or run; wider ones are cut. None: whole.
        transposed: names whose matrix view puts the second dimension first.
        ranks: processes that hold a shard of the blocks each: the flat vectors of each hold its
            shard only. None: every process holds everything.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layers: Mapping[str, str],
        kind_of: KindOf,
        vector_kind: Any,
        block_size: int | None,
        transposed: set[str] | frozenset[str] = frozenset(),
        ranks: Ranks | None = None,
    ) -> None:
        self.block_size, self.ranks = block_size, ranks
        self.views = {
            name: MatrixView(
                tuple(p.shape), matrix_shape(p.shape, name in transposed), name in transposed
            )
            for name, p in parameters.items()
        }
        self._forms = _forms_of(parameters)
        wide = {name: _state_dtype(p) for name, p in parameters.items()}
        self.dtype = max(wide.values(), key=lambda t: t.itemsize, default=torch.float32)
        #: The kind that was asked for, for each parameter.
        self.kinds: dict[str, BlockKind] = {n: kind_of(n, p) for n, p in parameters.items()}
        #: The kind of its blocks: another one if the parameter is no matrix.
        self.block_kinds = {
            name: vector_kind
            if kind.cut == "rectangles" and self.views[name].matrix is None
            else kind
            for name, kind in self.kinds.items()
        }
        plans = self._plan_blocks(layers, wide)
        self.layers = list(dict.fromkeys(plan.block.layer for plan in plans))
        #: All kinds of blocks in any process, since all processes must take the same way.
        self.all_kinds = list(dict.fromkeys(plan.kind for plan in plans))
        self._place_blocks(plans, parameters)
        # What an inner product over gradients and curvature products loses to rounding, relative to
        # the norms: its own sums, or the coarsest parameter's arithmetic.
        coarsest = max((torch.finfo(p.dtype).eps for p in parameters.values()), default=0.0)
        rounding = max(32 * torch.finfo(self.dtype).eps, 2 * coarsest)
        self.space = FlatSpace(self.groups, len(plans), self.dtype, rounding, ranks)

    def fits(self, parameters: Tensors) -> bool:
        """Tell whether parameters have the dtypes and shapes that the layout was made for."""
        return self._forms == _forms_of(parameters)

    # -- cutting -------------------------------------------------------------------------------

    def _plan_blocks(
        self, layers: Mapping[str, str], dtypes: Mapping[str, torch.dtype]
    ) -> list[PlannedBlock]:
        """Cut all layers into blocks, numbered."""
        # One layer may mix kinds; a layer and a kind together are what is cut.
        members: dict[tuple[str, BlockKind], list[str]] = {}
        for name, kind in self.kinds.items():
            members.setdefault((layers[name], kind), []).append(name)
        plans: list[PlannedBlock] = []
        numbers = {name: count() for name in self.kinds}
        for (layer, kind), names in members.items():
            for block_kind, shape, block in self._cut_layer(layer, kind, names):
                number = next(numbers[block.slices[0].name])
                block = replace(block, number=number, index=len(plans))
                dtype = max((dtypes[s.name] for s in block.slices), key=lambda t: t.itemsize)
                plans.append(PlannedBlock(block_kind, shape, dtype, block))
        return plans

    def _cut_layer(
        self, layer: str, kind: BlockKind, names: list[str]
    ) -> list[tuple[BlockKind, tuple[int, ...] | None, Block]]:
        """Cut the parameters of one layer: (kind of block, shape or None, block)."""
        whole = [Slice(n, None, (0, math.prod(self.views[n].shape))) for n in names]
        whole = [part for part in whole if part.numel]  # a parameter may have no entries
        if not whole:
            return []
        if kind.cut == "layer":
            return [(kind, None, Block(layer, tuple(whole)))]
        if kind.cut == "runs":
            runs = _cut_runs(layer, whole, self.block_size)
            return [(kind, (block.numel,), block) for block in runs]
        blocks: list[tuple[BlockKind, tuple[int, ...] | None, Block]] = []
        for part in whole:
            matrix = self.views[part.name].matrix
            if matrix is None:  # each 1-D parameter is a block of its own
                blocks.append((self.block_kinds[part.name], None, Block(layer, (part,))))
                continue
            for rows in _chunks(matrix[0], self.block_size):
                for columns in _chunks(matrix[1], self.block_size):
                    rectangle = Slice(part.name, rows, columns)
                    blocks.append((kind, rectangle.shape, Block(layer, (rectangle,))))
        return blocks

    def _place_blocks(self, plans: list[PlannedBlock], parameters: Mapping[str, Tensor]) -> None:
        """Give every block its place: of this process in its flat vector, of all in the joined."""
        size, rank = (1, 0) if self.ranks is None else (self.ranks.size, self.ranks.rank)
        runs = {name: _runs_of_processes(p, size) for name, p in parameters.items()}
        shards = [plans]
        if self.ranks is not None:
            shards = assign_shards(plans, size, lambda name, r: runs[name][r])
        held = [group_equal_blocks(shard) for shard in shards]
        self.groups: list[Group] = held[rank]
        sizes = [sum(group.numel for group in groups) for groups in held]
        #: Of this process's shard, and of the longest one; in the joined vector each takes as much.
        self.numel, self.width = sizes[rank], max(sizes)
        self._held: dict[str, list[tuple[Slice, int]]] = {name: [] for name in parameters}
        self._all: dict[str, list[tuple[Slice, int]]] = {name: [] for name in parameters}
        for number, groups in enumerate(held):
            for group in groups:
                for part, offset in group.slice_offsets:
                    start = group.start + offset
                    self._all[part.name].append((part, number * self.width + start))
                    if number == rank:
                        self._held[part.name].append((part, start))

    # -- tensors to flat vectors ---------------------------------------------------------------

    def pack(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Gather tensors shaped like the parameters into a new flat vector (missing ones: 0)."""
        return self._fill_flat(self.numel, self._held, tensors)

    def pack_all_shards(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """Gather them for all processes: the padded vectors of each, one behind the other."""
        if self.ranks is None:
            return self.pack(tensors)
        return self._fill_flat(self.width * self.ranks.size, self._all, tensors)

    def shard_of_this_rank(self, joined: Tensor) -> Tensor:
        """Return this process's flat vector out of the joined one."""
        if self.ranks is None:
            return joined
        start = self.ranks.rank * self.width
        return joined[start : start + self.numel].clone()

    def shards_of_all_ranks(self, joined: Tensor) -> Tensor:
        """Return this process's part of the joined vector of each process, (processes, numel)."""
        assert self.ranks is not None
        return self.ranks.exchange(joined.view(self.ranks.size, self.width))[:, : self.numel]

    def gather_blocks(self, group: Group, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return a group's blocks side by side, in one call; None counts as zero.

        Args:
            group: of this layout.
            tensors: the whole tensor of each slice; not all are None.

        Returns:
            (count, *shape), or one flat run if the blocks have any length, in the group's dtype. A
            block that is alone is no copy.
        """
        like = next(x for x in tensors if x is not None)
        cut = [
            like.new_zeros(part.shape) if x is None else part.cut_from(x, self.views[part.name])
            for (part, _), x in zip(group.slice_offsets, tensors, strict=True)
        ]
        return group.shape_blocks(cut[0] if len(cut) == 1 else torch.cat(cut)).to(group.dtype)

    def _fill_flat(
        self,
        numel: int,
        places: Mapping[str, list[tuple[Slice, int]]],
        tensors: Mapping[str, Tensor | None],
    ) -> Tensor:
        device = next((t.device for t in tensors.values() if t is not None), torch.device("cpu"))
        make = torch.empty if self.ranks is None else torch.zeros
        flat = make(numel, dtype=self.dtype, device=device)
        targets, sources = [], []
        for name, slices in places.items():
            tensor = tensors.get(name)
            parts = [(s, flat[start : start + s.numel].view(s.shape)) for s, start in slices]
            if tensor is None:
                for _, target in parts:
                    target.zero_()
            elif is_sharded(tensor):
                self._fill_from_rows(name, tensor, parts)
            else:
                targets += [target for _, target in parts]
                sources += [part.cut_from(tensor, self.views[name]) for part, _ in parts]
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat

    def _fill_from_rows(
        self, name: str, tensor: Any, parts: Sequence[tuple[Slice, Tensor]]
    ) -> None:
        """Copy from a sharded tensor: its own rows, or all of them, one parameter at a time."""
        if self.block_kinds[name].elementwise:
            for _, target in parts:
                target.copy_(local(tensor).reshape(-1))
            return
        whole = tensor.full_tensor()
        for part, target in parts:
            target.copy_(part.cut_from(whole, self.views[name]))

    # -- flat vectors to tensors ---------------------------------------------------------------

    def unpack(self, flat: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters; they may share the memory of ``flat``."""
        joined = flat if self.ranks is None else self.ranks.join(flat, self.width)
        places = self._all
        return {
            name: self.join_slices(
                name, [joined[a : a + s.numel].view(s.shape) for s, a in places[name]], flat
            )
            for name in (places if names is None else names)
        }

    def unpack_like(self, flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters, sharded as those of ``like`` are."""
        # Without fully_shard every process needs the whole result.
        if not any_sharded(like.values()):
            return self.unpack(flat, list(like))
        return {name: self._unpack_rows(name, flat, tensor) for name, tensor in like.items()}

    def _unpack_rows(self, name: str, flat: Tensor, like: Tensor) -> Tensor:
        """Return one parameter's part of the flat vectors, as rows in each process."""
        assert self.ranks is not None
        parts = [(s, flat[start : start + s.numel].view(s.shape)) for s, start in self._held[name]]
        kind = self.block_kinds[name]
        if kind.elementwise:
            return sharded_like(parts[0][1] if parts else flat[:0], like)
        view = self.views[name]
        as_matrix = kind.cut == "rectangles" and view.matrix
        whole = flat.new_zeros(as_matrix if as_matrix else math.prod(view.shape))
        for part, values in parts:
            columns = slice(*part.columns)
            whole[columns if part.rows is None else (slice(*part.rows), columns)] = values
        # Each process wrote its blocks into zeros: the sum puts the parameter together.
        self.ranks.sum_(whole)
        full = view.write_matrix(whole) if as_matrix else whole.view(view.shape)
        first, last = rows_of(view.shape, self.ranks.rank, self.ranks.size)
        return sharded_like(full[first:last], like)

    def join_slices(self, name: str, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Put a parameter together from its slices, in the order of the layout."""
        view, slices = self.views[name], self.slices_of(name)
        if not slices:
            return like.new_empty(view.shape)
        shape = (math.prod(view.shape),) if slices[0].rows is None else view.matrix
        assert shape is not None
        if len(slices) == 1:
            whole = _startable(parts[0], view.shape)
        else:
            whole = parts[0].new_empty(shape)
            ordered = sorted(zip(slices, parts, strict=True), key=lambda x: x[0].place)
            # One call for the rectangles that lie beside each other, or for all runs.
            for rows, line in groupby(ordered, key=lambda x: x[0].rows):
                beside = [values for _, values in line]
                torch.cat(beside, -1, out=whole if rows is None else whole[slice(*rows)])
        return whole.reshape(view.shape) if len(shape) == 1 else view.write_matrix(whole)

    def slices_of(self, name: str) -> list[Slice]:
        """Return the slices that a parameter was cut into."""
        return [part for part, _ in self._all[name]]


def _forms_of(parameters: Tensors) -> tuple[list[torch.dtype], list[torch.Size]]:
    # Mapped without a loop in Python, since every step compares all parameters.
    tensors = list(parameters.values())
    return list(map(DTYPE, tensors)), list(map(SHAPE, tensors))


def _startable(run: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a run of a flat vector, copied if torch.view_as_complex would refuse its start.

    Parameters whose last dimension is 2 are often pairs of real and imaginary part.
    """
    paired = bool(shape) and shape[-1] == 2
    return run.clone() if paired and run.storage_offset() % 2 else run


def _runs_of_processes(parameter: Tensor, size: int) -> list[tuple[int, int]]:
    """Return the run of flat entries of each process: its rows if the parameter is sharded."""
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


def _cut_runs(layer: str, whole: list[Slice], block_size: int | None) -> list[Block]:
    """Cut the concatenation of flat slices into blocks of at most ``block_size`` entries."""
    size = sum(part.numel for part in whole)
    blocks = []
    for low, high in _chunks(size, block_size):
        slices, offset = [], 0
        for part in whole:
            a, b = max(low - offset, 0), min(high - offset, part.numel)
            if a < b:
                slices.append(Slice(part.name, None, (a, b)))
            offset += part.numel
        blocks.append(Block(layer, tuple(slices)))
    return blocks
