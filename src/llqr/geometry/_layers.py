"""From parameters to layers, matrix views, blocks and one flat vector.

Only :class:`Layout` knows names, leaves and blocks. Everything behind it (structures, solver) sees
flat vectors and groups of equal blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, groupby

import torch
from torch import Tensor, nn

__all__ = ["Block", "Group", "Layout", "Piece", "layers_of", "matrix_shape", "unwrap"]

STRUCTURES = ("identity", "scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense")
KRONECKER = ("diag-kfac", "kfac", "e-kfac")


def unwrap(model: nn.Module) -> nn.Module:
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
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{layer}.{leaf}" if layer else leaf
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
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) < 2:
        return None
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class View:
    """How one parameter is read as a matrix, and a matrix written back as the parameter."""

    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    transposed: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """Return the matrix view (a copy only where strides force one)."""
        assert self.matrix is not None
        return (tensor.transpose(0, 1) if self.transposed else tensor).reshape(self.matrix)

    def write(self, matrix: Tensor) -> Tensor:
        """Return ``matrix`` shaped like the parameter, sharing its memory."""
        if not self.transposed:
            return matrix.reshape(self.shape)
        swapped = (self.shape[1], self.shape[0], *self.shape[2:])
        return matrix.reshape(swapped).transpose(0, 1)


@dataclass(frozen=True)
class Piece:
    """A part of one parameter: a rectangle of its matrix view, or a run of its flat entries."""

    name: str
    rows: tuple[int, int] | None
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of the piece: (m, n) for a rectangle, (n,) for a run."""
        n = self.columns[1] - self.columns[0]
        return (n,) if self.rows is None else (self.rows[1] - self.rows[0], n)

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def of(self, tensor: Tensor, view: View) -> Tensor:
        """Cut the piece out of a tensor shaped like the parameter."""
        a, b = self.columns
        if self.rows is None:
            return tensor.reshape(-1)[a:b]
        return view.read(tensor)[self.rows[0] : self.rows[1], a:b]


@dataclass(frozen=True)
class Block:
    """One diagonal block of U: the pieces that it acts on, in the order of its flat vector.

    ``number`` counts the blocks that start in the same parameter. It names the block in exported
    states, and so depends on nothing but the parameters of its layer.
    """

    layer: str
    pieces: tuple[Piece, ...]
    number: int = 0

    @property
    def numel(self) -> int:
        """The number of gradient entries that the block acts on."""
        return sum(piece.numel for piece in self.pieces)


@dataclass
class Group:
    """Blocks of one structure, held together in one contiguous run of the flat vector.

    Kronecker and dense blocks of a group have one ``shape`` and are a (count, *shape) view;
    elementwise, scalar and identity blocks are of any length and stay one flat run. "vector" is
    the elementwise structure of a 1-D parameter in a Kronecker layer.
    """

    structure: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    blocks: list[Block] = field(default_factory=list)
    start: int = 0

    @property
    def numel(self) -> int:
        """The number of gradient entries of the group."""
        return sum(block.numel for block in self.blocks)

    @property
    def lengths(self) -> list[int]:
        """The number of gradient entries of each block."""
        return [block.numel for block in self.blocks]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The blocks as runs of equal length: (blocks, length) in order."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    def places(self) -> list[tuple[Piece, int]]:
        """The pieces of all blocks, each with where it starts in the group."""
        pieces = [piece for block in self.blocks for piece in block.pieces]
        starts = accumulate((piece.numel for piece in pieces), initial=0)
        return list(zip(pieces, starts, strict=False))

    def matrices(self, part: Tensor) -> list[Tensor]:
        """Return the group's part of a flat vector as (blocks, length) views, one a run."""
        sizes = [count * length for count, length in self.runs]
        pieces = torch.split(part.reshape(-1), sizes)
        return [p.view(run) for p, run in zip(pieces, self.runs, strict=True)]

    def view(self, flat: Tensor) -> Tensor:
        """Return the group's part of a flat vector, without a copy."""
        return self.shaped(flat[self.start : self.start + self.numel])

    def shaped(self, part: Tensor) -> Tensor:
        """Return the group's own flat vector as a batch of blocks, or as it is."""
        return part if self.shape is None else part.view(len(self.blocks), *self.shape)


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
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layers: Mapping[str, str],
        structure_of: StructureOf,
        block_size: int | None,
        transposed: set[str] | frozenset[str] = frozenset(),
    ) -> None:
        self.block_size = block_size
        self.structures: dict[str, str] = {}
        self.views = {
            name: View(
                tuple(p.shape), matrix_shape(p.shape, name in transposed), name in transposed
            )
            for name, p in parameters.items()
        }
        self._dtypes = {name: _state_dtype(p) for name, p in parameters.items()}
        self.dtype = max(self._dtypes.values(), key=lambda t: t.itemsize, default=torch.float32)
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
        groups: dict[tuple[str, tuple[int, ...] | None, torch.dtype], Group] = {}
        numbers = {name: count() for name in parameters}
        for (layer, structure), names in members.items():
            for kind, shape, block in self._blocks(layer, structure, names):
                block = replace(block, number=next(numbers[block.pieces[0].name]))
                dtype = max((self._dtypes[p.name] for p in block.pieces), key=lambda t: t.itemsize)
                key = (kind, shape, dtype)
                groups.setdefault(key, Group(kind, shape, dtype)).blocks.append(block)
        self.groups = list(groups.values())
        self._runs = [run for group in self.groups for run in group.runs]
        self.numel = 0
        self._of_parameter: dict[str, list[tuple[Piece, int]]] = {name: [] for name in parameters}
        for group in self.groups:
            group.start = self.numel
            for piece, offset in group.places():
                self._of_parameter[piece.name].append((piece, group.start + offset))
            self.numel += group.numel

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
        device = next((t.device for t in tensors.values() if t is not None), torch.device("cpu"))
        flat = torch.empty(self.numel, dtype=self.dtype, device=device)
        for group in self.groups:
            self.gather(group, tensors, flat[group.start : group.start + group.numel])
        return flat

    def gather(self, group: Group, tensors: Mapping[str, Tensor | None], out: Tensor) -> None:
        """Write a group's part of the flat vector (missing tensors: 0)."""
        targets, sources = [], []
        for piece, start in group.places():
            tensor, target = tensors.get(piece.name), out[start : start + piece.numel]
            if tensor is None:
                target.zero_()
                continue
            targets.append(target.view(piece.shape))
            sources.append(piece.of(tensor, self.views[piece.name]))
        if targets:
            torch._foreach_copy_(targets, sources)

    def unpack(self, flat: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return tensors shaped like the parameters; they may share the memory of ``flat``."""
        places = self._of_parameter
        return {
            name: self.join(name, [flat[a : a + piece.numel] for piece, a in places[name]], flat)
            for name in (places if names is None else names)
        }

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
        return [piece for piece, _ in self._of_parameter[name]]

    @property
    def leaves(self) -> int:
        """The number of blocks."""
        return sum(count for count, _ in self._runs)

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of two flat vectors, or of a matrix's rows with one."""
        return torch.matmul(a, b)

    def gram(self, rows: Tensor, b: Tensor) -> Tensor:
        """Return each block's share of the inner products of (k, P) rows with b: (blocks, k)."""
        parts, start = [], 0
        for many, length in self._runs:
            stop = start + many * length
            a, v = rows[:, start:stop], b[start:stop]
            if many == 1:
                parts.append(torch.mv(a, v)[None])
            else:
                a = a.view(len(rows), many, length).transpose(0, 1)
                parts.append(torch.bmm(a, v.view(many, length, 1))[:, :, 0])
            start = stop
        return torch.cat(parts)

    def combine(self, coefficients: Tensor, rows: Tensor, out: Tensor) -> None:
        """Add to ``out`` the rows with coefficients of each block, (blocks, k) and (k, P)."""
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
