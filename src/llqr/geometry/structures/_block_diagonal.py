"""U as a whole: the structures of all groups of a layout, acting on flat vectors and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import repeat
from operator import is_
from typing import cast

import torch
from torch import Tensor

from ..._devices import widen, widest_dtype
from ..._vectors import Tensors
from ..layout import Block, Layout
from ._application import Application
from ._base import Bounds, State, Structure

__all__ = ["BlockDiagonal", "States"]

States = list[State]
Exported = dict[str, dict[str, Tensor]]
Span = tuple[int, int] | None
Visitor = Callable[[list[str], str, Tensor, Span], object]


class BlockDiagonal:
    """The block-diagonal matrix U: one :class:`Structure` per group of the layout.

    Attributes:
        parts: the structures, in the order of the layout's groups.
        layout: names, blocks and shards.
        space: inner products on the flat vectors.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.space = layout, layout.space
        self.parts: list[Structure] = [
            cast(type[Structure], group.kind)(group) for group in layout.groups
        ]

        #: The parameters of each part's slices.
        self._names = [[s.name for s, _ in group.slice_offsets] for group in layout.groups]
        # Of the blocks of all processes, since all must take the same way.
        kinds = [cast(type[Structure], kind) for kind in layout.all_kinds]
        #: Whether U is linear in its trainable entries.
        self.linear = all(kind.linear for kind in kinds)
        #: Whether no block has several trainable entries, each clipped by its own norm.
        self.single_entries = all(len(kind.trainable) <= 1 for kind in kinds)
        #: Whether anything is trainable.
        self.learns = any(kind.trainable for kind in kinds)
        #: Whether bases follow the gradient.
        self.renews_bases = any(kind.renews_bases for kind in kinds)

    def identity(self, device: torch.device) -> States:
        """Return the states at which U is the identity."""
        return [part.identity(device) for part in self.parts]

    # -- U on vectors --------------------------------------------------------------------------

    def apply(self, states: States, flat: Tensor) -> Tensor:
        """Return U x as a new flat vector."""
        out = torch.empty_like(flat)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view_of(out).copy_(part.apply(state, part.group.read_from(flat)))
        return out

    def apply_to_tensors(self, states: States, tensors: Tensors) -> dict[str, Tensor]:
        """Return U x for tensors shaped like the parameters; those not given count as zero.

        Elementwise blocks scale the tensors as they lie; only the others are gathered.
        """
        done: dict[str, Tensor] = {}
        pieces: dict[str, list[Tensor]] = {}
        for part, state, names in zip(self.parts, states, self._names, strict=True):
            given = list(map(tensors.get, names))
            if all(map(is_, given, repeat(None))):
                continue
            if part.elementwise:  # its slices are whole parameters
                scaled = zip(names, part.scale_tensors(state, given), strict=True)
                done.update({name: x for name, x in scaled if x is not None})
                continue
            # The others need the blocks side by side: gather, multiply, cut apart again.
            moved = part.apply(state, self.layout.gather_blocks(part.group, given))
            cut_apart(part, names, moved, pieces)
        return self._join_pieces(tensors, pieces, done)

    def _join_pieces(
        self, tensors: Tensors, pieces: Mapping[str, list[Tensor]], done: Tensors
    ) -> dict[str, Tensor]:
        """Return what is done, and the other tensors put together from their slices."""
        join = self.layout.join_slices
        return {
            name: done[name] if name in done else join(name, pieces.get(name, []), x)
            for name, x in tensors.items()
        }

    def pullback(self, states: States, x: Tensor, r: Tensor) -> States:
        """Return the gradient of <r, U x> in the trainable entries."""
        return [
            part.pullback(state, part.group.read_from(x), part.group.read_from(r))
            for part, state in zip(self.parts, states, strict=True)
        ]

    def applied_forms(self, states: States, application: Application) -> States:
        """Return states that apply faster, for structures that have such."""
        return [
            part.applied_form(state, application)
            for part, state in zip(self.parts, states, strict=True)
        ]

    # -- linear structures, in rotated coordinates ---------------------------------------------

    def rotate(self, states: States, flat: Tensor) -> Tensor:
        """Return x in the coordinates of a linear structure, or x itself if none rotates."""
        return self._map_rotation(states, flat, lambda part, *args: part.rotate(*args))

    def rotate_back(self, states: States, flat: Tensor) -> Tensor:
        """Undo :meth:`rotate`."""
        return self._map_rotation(states, flat, lambda part, *args: part.rotate_back(*args))

    def _map_rotation(
        self, states: States, flat: Tensor, rotation: Callable[[Structure, State, Tensor], Tensor]
    ) -> Tensor:
        if not any(part.rotates for part in self.parts):
            return flat
        out = torch.empty_like(flat)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view_of(out).copy_(rotation(part, state, part.group.read_from(flat)))
        return out

    def with_orthogonal_bases(self, states: States) -> States:
        """Return states whose rotations keep lengths."""
        pairs = zip(self.parts, states, strict=True)
        return [part.with_orthogonal_bases(state) for part, state in pairs]

    def rotated_names(self) -> frozenset[str]:
        """Return the parameters whose structure rotates."""
        pairs = zip(self.parts, self._names, strict=True)
        return frozenset(name for part, names in pairs if part.rotates for name in names)

    def rotate_tensors(
        self, states: States, tensors: Tensors, *, back: bool = False
    ) -> dict[str, Tensor]:
        """Return :meth:`rotate`, or what undoes it, for tensors shaped like the parameters."""
        pieces: dict[str, list[Tensor]] = {}
        for part, state, names in zip(self.parts, states, self._names, strict=True):
            given = list(map(tensors.get, names))
            if part.rotates and not all(map(is_, given, repeat(None))):
                turn = part.rotate_back if back else part.rotate
                moved = turn(state, self.layout.gather_blocks(part.group, given))
                cut_apart(part, names, moved, pieces)
        # The parameters of other structures stay as they are.
        stay = {name: x for name, x in tensors.items() if name not in pieces}
        return self._join_pieces(tensors, pieces, stay)

    def act_rotated(self, states: States, x: Tensor) -> Tensor:
        """Return U x, with x and U x in rotated coordinates."""
        out = torch.empty_like(x)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view_of(out).copy_(part.act_rotated(state, part.group.read_from(x)))
        return out

    def pull_rotated(self, x: Tensor, r: Tensor) -> States:
        """Return the pullback of r at x, both in rotated coordinates."""
        return [
            part.pull_rotated(part.group.read_from(x), part.group.read_from(r))
            for part in self.parts
        ]

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write what U x changes by along the pullback of r, all rotated."""
        for part in self.parts:
            view = part.group.view_of
            part.kernel_product(view(x), view(r), view(out))

    # -- states --------------------------------------------------------------------------------

    def project(self, states: States, bounds: Bounds) -> States:
        """Return the states with every block's eigenvalues inside the bounds."""
        return [p.project(s, bounds) for p, s in zip(self.parts, states, strict=True)]

    def floor_entries(self, states: States) -> States:
        """Return the states as the authors' code bounds them when U is unconstrained."""
        return [part.floor_entries(state) for part, state in zip(self.parts, states, strict=True)]

    def renew_bases(self, states: States, g: Tensor, first: bool, renew: bool) -> States:
        """Return the states after bases that follow the gradient have seen this one."""
        return [
            part.renew_bases(state, part.group.read_from(g), first, renew)
            for part, state in zip(self.parts, states, strict=True)
        ]

    def average(self, old: States, new: States, beta: float) -> States:
        """Return beta old + (1 - beta) new of the trainable entries (factors, not operators)."""
        return [
            {**n, **{k: (beta * o[k]).add_(n[k], alpha=1 - beta) for k in part.trainable}}
            for part, o, n in zip(self.parts, old, new, strict=True)
        ]

    def split_by_block(self, entries: States) -> list[Tensor]:
        """Return one view per entry and block, the unit of the inner gradient's clip."""
        return [
            view
            for part, e in zip(self.parts, entries, strict=True)
            for view in part.split_by_block(e)
        ]

    def norms_by_block(self, entries: States) -> list[Tensor]:
        """Return the norms of :meth:`split_by_block`, of whole blocks also if they are sharded."""
        views = self.split_by_block(entries)
        norms = list(torch._foreach_norm(views)) if views else []
        if not self.space.sharded:
            return norms
        # Only elementwise blocks lie in several processes; their norms add up over them.
        cut, start = [], 0
        for part, e in zip(self.parts, entries, strict=True):
            if part.elementwise and e:
                cut += [(start + i, block.index) for i, block in enumerate(part.group.blocks)]
            start += len(part.split_by_block(e))
        assert self.layout.ranks is not None  # as it is sharded
        device = self.layout.ranks.device
        squares = torch.zeros(self.space.block_count, dtype=widest_dtype(device), device=device)
        for i, block in cut:
            squares[block] = widen(norms[i]).square()
        self.space.sum_over_shards(squares)
        for i, block in cut:
            norms[i] = squares[block].sqrt().to(norms[i].dtype)
        return norms

    def extreme_eigenvalues(self, states: States, exact: bool) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalue of each layer."""
        spectrum: dict[str, tuple[float, float]] = {}
        for part, state in zip(self.parts, states, strict=True):
            lows, highs = (t.tolist() for t in part.extreme_eigenvalues(state, exact))
            for block, low, high in zip(part.group.blocks, lows, highs, strict=True):
                a, b = spectrum.get(block.layer, (low, high))
                spectrum[block.layer] = (min(a, low), max(b, high))
        return self.space.widest_ranges(spectrum, self.layout.layers)

    # -- checkpoints ---------------------------------------------------------------------------

    def export(self, states: States) -> Exported:
        """Return the states per parameter: {name: {key: tensor}} (views, canonical order).

        Elementwise states have the parameter's shape; a block's other states are on the first
        parameter that the block touches, under "<entry>.<number of the block there>".
        """
        exported: Exported = {name: {} for name in self.layout.kinds}
        self._visit_states(
            states, lambda names, key, view, _: exported[names[0]].update({key: view})
        )
        return exported

    def export_all_shards(self, states: States, template: Exported) -> Exported:
        """Return the states of all processes, whole, in new tensors like those of the template.

        Args:
            states: this process's shard.
            template: what :meth:`export` gives if nothing is sharded.
        """
        ranks = self.layout.ranks
        assert ranks is not None
        whole: Exported = {
            name: {key: torch.zeros_like(v, device=ranks.device) for key, v in entries.items()}
            for name, entries in template.items()
        }
        self._visit_states(
            states,
            lambda names, key, view, span: _run_of(whole[names[0]][key], span).copy_(view),
        )
        for entries in whole.values():
            for value in entries.values():
                ranks.sum_(value)
        return whole

    def load(
        self,
        states: States,
        exported: Mapping[str, Mapping[str, Tensor]],
        optional: Collection[str] = (),
        fresh: Collection[str] = (),
    ) -> list[str]:
        """Copy exported states in; return what was missing, too much, or of another shape.

        Args:
            states: changed in place.
            exported: what :meth:`export` returned.
            optional: parameters whose blocks may be missing; those stay as they are.
            fresh: parameters whose blocks stay as they are, whatever else they touch.
        """
        wrong: list[str] = []
        # What is still left at the end has no place here.
        left = {(name, key) for name, entries in exported.items() for key in entries}

        def copy(names: list[str], key: str, view: Tensor, span: Span) -> None:
            if any(name in fresh for name in names):
                return
            left.discard((names[0], key))
            value = exported.get(names[0], {}).get(key)
            if value is None:
                if not all(name in optional for name in names):
                    wrong.append(f"{names[0]}: no {key!r}")
            elif span is None and value.shape != view.shape:
                wrong.append(
                    f"{names[0]}: {key!r} has shape {tuple(value.shape)}, "
                    f"expected {tuple(view.shape)}"
                )
            else:
                view.copy_(_run_of(value, span))

        self._visit_states(states, copy)
        return wrong + [f"{name}: {key!r} is not known here" for name, key in sorted(left)]

    def _visit_states(self, states: States, visit: Visitor) -> None:
        """Visit (parameters of the block, the owner first; key; view of the state; its span).

        The span is the run of the parameter's entries that this process holds; None: all.
        """
        for part, state in zip(self.parts, states, strict=True):
            blocks = zip(part.group.blocks, part.states_of_blocks(state), strict=True)
            for block, entries in blocks:
                names = [s.name for s in block.slices]
                for key, value in entries.items():
                    if part.elementwise:
                        self._visit_entries(block, key, value, visit)
                    else:
                        visit(names, f"{key}.{block.number}", value, None)

    def _visit_entries(self, block: Block, key: str, values: Tensor, visit: Visitor) -> None:
        """Visit an elementwise block: one view per parameter, in its shape if it is whole."""
        runs = torch.split(values, [s.numel for s in block.slices])
        for s, run in zip(block.slices, runs, strict=True):
            shape = self.layout.views[s.name].shape
            if s.numel == math.prod(shape):
                visit([s.name], key, run.view(shape), None)
            else:
                visit([s.name], key, run, s.columns)


def cut_apart(
    part: Structure, names: Sequence[str], blocks: Tensor, pieces: dict[str, list[Tensor]]
) -> None:
    """Add the slices of a part's blocks to the pieces of their parameters."""
    for name, values in zip(names, part.group.split_slices(blocks), strict=True):
        pieces.setdefault(name, []).append(values)


def _run_of(tensor: Tensor, span: Span) -> Tensor:
    """Return the run of a tensor's entries that a process holds."""
    return tensor if span is None else tensor.reshape(-1)[slice(*span)]
