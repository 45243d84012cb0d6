"""U as a whole: the structures of all groups of a layout, acting on one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from ._ekfac import EKfac
from ._layers import Layout
from ._pieces import ELEMENTWISE, Group
from ._structure import Bounds, State, Structure
from ._structures import Diagonal, make_structure

__all__ = ["BlockDiagonal", "States"]

States = list[State]
Exported = dict[str, dict[str, Tensor]]
Span = tuple[int, int] | None


class BlockDiagonal:
    """The block-diagonal structure of U: one :class:`Structure` a group of the layout."""

    def __init__(self, layout: Layout, *, learned: bool = True, square: bool = False) -> None:
        self.layout = layout
        self.parts: list[Structure] = [
            make_structure(group, learned=learned, square=square) for group in layout.groups
        ]
        # Of all processes, since all must take the same way.
        self._linear = all(
            make_structure(Group(*kind), learned=learned, square=square).linear
            for kind in layout.kinds
        )

    @property
    def linear(self) -> bool:
        """True when U is linear in its trainable entries."""
        return self._linear

    def identity(self, device: torch.device) -> States:
        """Return the states at which U is the identity."""
        return [part.identity(device) for part in self.parts]

    def trainable(self, states: States) -> States:
        """Return the entries that the inner solve changes."""
        return [{k: s[k] for k in p.trainable} for p, s in zip(self.parts, states, strict=True)]

    def lowered(self, states: States) -> States:
        """Return states to apply faster, in lower precision, where a structure has such."""
        return [part.lowered(state) for part, state in zip(self.parts, states, strict=True)]

    def apply(self, states: States, flat: Tensor) -> Tensor:
        """Return U x as a new flat vector."""
        out = torch.empty_like(flat)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view(out).copy_(part.apply(state, part.group.own(flat)))
        return out

    def transform(self, states: States, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return U x for tensors shaped like the parameters; those not given count as zero.

        Elementwise blocks multiply the tensors as they lie; only the others are gathered.
        """
        done: dict[str, Tensor] = {}
        parts: dict[str, list[Tensor]] = {}
        for part, state in zip(self.parts, states, strict=True):
            places = part.group.places
            if isinstance(part, Diagonal):  # its pieces are whole parameters
                runs = torch.split(state["U"], [q.numel for q, _ in places])
                pairs = [(q.name, u) for (q, _), u in zip(places, runs, strict=True)]
                us = {n: u.view(tensors[n].shape) for n, u in pairs if n in tensors}
                if us:
                    results = torch._foreach_mul(list(us.values()), [tensors[n] for n in us])
                    done.update(zip(us, results, strict=True))
                continue
            first = next((q.name for q, _ in places if q.name in tensors), None)
            if first is None:
                continue
            device = tensors[first].device
            flat = torch.empty(part.group.numel, dtype=part.group.dtype, device=device)
            self.layout.gather(part.group, tensors, flat)
            whole = part.apply(state, part.group.shaped(flat)).reshape(-1)
            for piece, a in places:
                parts.setdefault(piece.name, []).append(whole[a : a + piece.numel])
        return {
            name: done[name] if name in done else self.layout.join(name, parts.get(name, []), x)
            for name, x in tensors.items()
        }

    def pullback(self, states: States, x: Tensor, r: Tensor) -> States:
        """Return the gradient of <r, U x> in the trainable entries."""
        return [
            part.pullback(state, part.group.own(x), part.group.own(r))
            for part, state in zip(self.parts, states, strict=True)
        ]

    def turn(self, states: States, flat: Tensor) -> Tensor:
        """Return x in the coordinates of a linear structure, or x itself where nothing turns."""
        return self._turned(states, flat, "turn")

    def act(self, states: States, x: Tensor) -> Tensor:
        """Return U x, with x and U x in turned coordinates (linear structures)."""
        out = torch.empty_like(x)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view(out).copy_(part.act(state, part.group.own(x)))
        return out

    def pull(self, x: Tensor, r: Tensor) -> States:
        """Return the pullback of r at x, both in turned coordinates (linear structures)."""
        return [part.pull(part.group.own(x), part.group.own(r)) for part in self.parts]

    def turn_back(self, states: States, flat: Tensor) -> Tensor:
        """Undo :meth:`turn`."""
        return self._turned(states, flat, "turn_back")

    def _turned(self, states: States, flat: Tensor, way: str) -> Tensor:
        if not any(isinstance(part, EKfac) for part in self.parts):
            return flat
        out = torch.empty_like(flat)
        for part, state in zip(self.parts, states, strict=True):
            part.group.view(out).copy_(getattr(part, way)(state, part.group.own(flat)))
        return out

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write what U x changes by along the pullback of r (linear structures, turned)."""
        for part in self.parts:
            view = part.group.view
            part.tangent(view(x), view(r), view(out))

    def project(self, states: States, bounds: Bounds) -> States:
        """Return the states with every block's eigenvalues inside the bounds."""
        return [p.project(s, bounds) for p, s in zip(self.parts, states, strict=True)]

    def average(self, old: States, new: States, beta: float) -> States:
        """Return beta old + (1 - beta) new of the trainable entries (factors, not operators)."""
        return [
            {**n, **{k: beta * o[k] + (1 - beta) * n[k] for k in part.trainable}}
            for part, o, n in zip(self.parts, old, new, strict=True)
        ]

    def leaves(self, entries: States) -> list[Tensor]:
        """Return one view a leaf, the unit of the inner solver's gradient clip."""
        return [
            leaf for part, e in zip(self.parts, entries, strict=True) for leaf in part.leaves(e)
        ]

    def leaf_norms(self, entries: States) -> list[Tensor]:
        """Return the norm of each leaf, whole also where processes share it."""
        leaves = self.leaves(entries)
        norms = list(torch._foreach_norm(leaves)) if leaves else []
        ranks = self.layout.ranks
        if ranks is None:
            return norms
        shared, start = [], 0
        for part, e in zip(self.parts, entries, strict=True):
            if part.group.structure in ELEMENTWISE:
                shared += [(start + i, block.leaf) for i, block in enumerate(part.group.blocks)]
            start += len(part.leaves(e))
        squares = torch.zeros(self.layout.leaves, dtype=torch.float64, device=ranks.device)
        for i, leaf in shared:
            squares[leaf] = norms[i].double().square()
        ranks.sum_(squares)
        for i, leaf in shared:
            norms[i] = squares[leaf].sqrt().to(norms[i].dtype)
        return norms

    def extremes(self, states: States, exact: bool) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest eigenvalue of each layer."""
        spectrum: dict[str, tuple[float, float]] = {}
        for part, state in zip(self.parts, states, strict=True):
            lows, highs = (t.tolist() for t in part.extremes(state, exact))
            for block, low, high in zip(part.group.blocks, lows, highs, strict=True):
                a, b = spectrum.get(block.layer, (low, high))
                spectrum[block.layer] = (min(a, low), max(b, high))
        return self.layout.widest(spectrum)

    def export(self, states: States) -> Exported:
        """Return the states per parameter: {name: {key: tensor}} (views, canonical order).

        Elementwise states have the parameter's shape under "U"; a block's other states are on the
        first parameter that the block touches, under "<entry>.<number of the block there>".
        """
        exported: Exported = {name: {} for name in self.layout.structures}
        self._walk(states, lambda names, key, view, _: exported[names[0]].update({key: view}))
        return exported

    def gather(self, states: States, template: Exported) -> Exported:
        """Return the states of all processes, whole, in new tensors like those of the template.

        Args:
            states: this process's share.
            template: what :meth:`export` gives where nothing is shared out.
        """
        ranks = self.layout.ranks
        assert ranks is not None
        whole: Exported = {
            name: {key: torch.zeros_like(v, device=ranks.device) for key, v in entries.items()}
            for name, entries in template.items()
        }
        self._walk(
            states,
            lambda names, key, view, span: _part(whole[names[0]][key], span).copy_(view),
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
    ) -> list[str]:
        """Copy exported states in; return what was missing, too much, or of another shape.

        Args:
            states: changed in place.
            exported: what :meth:`export` returned.
            optional: parameters whose blocks may be missing; those stay as they are.
        """
        wrong: list[str] = []
        left = {(name, key) for name, entries in exported.items() for key in entries}

        def copy(names: list[str], key: str, view: Tensor, span: Span) -> None:
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
                view.copy_(_part(value, span))

        self._walk(states, copy)
        return wrong + [f"{name}: {key!r} is not known here" for name, key in sorted(left)]

    def _walk(
        self, states: States, visit: Callable[[list[str], str, Tensor, Span], object]
    ) -> None:
        """Visit (parameters of the block, the owner first; key; view of the state; its span).

        The span is the run of the parameter's entries that this process holds; None: all.
        """
        for part, state in zip(self.parts, states, strict=True):
            for block, entries in zip(part.group.blocks, part.blockwise(state), strict=True):
                if part.group.structure in ("diagonal", "vector"):
                    ends = list(accumulate(piece.numel for piece in block.pieces))
                    for piece, end in zip(block.pieces, ends, strict=True):
                        shape = self.layout.views[piece.name].shape
                        run = entries["U"][end - piece.numel : end]
                        if piece.numel == math.prod(shape):
                            visit([piece.name], "U", run.view(shape), None)
                        else:
                            visit([piece.name], "U", run, piece.columns)
                    continue
                names = [piece.name for piece in block.pieces]
                for key, value in entries.items():
                    visit(names, f"{key}.{block.number}", value, None)


def _part(tensor: Tensor, span: Span) -> Tensor:
    """Return the run of a tensor's entries that a process holds."""
    return tensor if span is None else tensor.reshape(-1)[slice(*span)]
