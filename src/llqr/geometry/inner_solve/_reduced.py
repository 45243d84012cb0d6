r"""The inner solve of a linear structure, with vectors only where a product is new.

Let U be linear in its state s. A step moves s along pullbacks of residuals, and every residual is
a combination of few vectors: with the directions d = -U g written in an orthonormal basis q_i,

    r = g + C d + damping d = sum_j a_j F_j,    F_0 = g,  F_i = (C + damping) q_i.

So every iterate is s_0 + sum_j x[l, j] pullback(g, F_j)[l], one coefficient per block l and vector
j (per block, because the gradient of each block is clipped by its own factor). With the symmetric
map

    K f = U[pullback(g, f)] g,    <pullback(g, f), pullback(g, h)> = <f, K h>    (block by block),

all that the momentum loop decides by are inner products of F_j, K F_j and q_i: it runs on
coefficients in float64 on the host. A product is computed when the part of d outside the basis
matters (see :class:`RecycledProduct`), and only then are there operations on
whole vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..._vectors import quadratic_value
from ..structures import States
from ._objective import Objective
from ._recycled_product import RecycledProduct, longest_negligible
from ._rows import JoinedRows, Rows, append_border
from ._solvers import InnerSolver, SolverOptions

__all__ = ["solve_on_coefficients"]

#: The host, whatever the default device is.
F64: Any = {"dtype": torch.float64, "device": "cpu"}
#: u and (C + damping) u.
ControlAndImage = tuple[Tensor, Tensor]


def solve_on_coefficients(
    objective: Objective,
    states: States,
    solver: InnerSolver,
    options: SolverOptions,
    tolerance: float,
    capacity: int,
    known: ControlAndImage | None = None,
) -> tuple[States, Tensor]:
    """Do what :func:`solve_literally` does, for linear structures, within a tolerance.

    Args:
        objective: J; its product is the real one, or one that several solves share, whose
            directions and images are then those of the solve too.
        states: where the solve starts; not changed.
        solver: one with ``heavy_ball``.
        options: how to solve.
        tolerance: error allowed in a residual, relative to its norm, as far as the largest image
            of a direction so far tells. In float32 no residual is told from zero that is below
            32 eps / tolerance of C d.
        capacity: how many directions are kept at a time; when they are used up the solve goes on
            from where it is with an empty basis.
        known: a control u with (C + damping) u, which is a first direction that costs nothing.

    Returns:
        The new states and J at the old ones (at ``known``, if that is given).
    """
    momentum, left, first = None, options.steps, None
    while left or first is None:
        stage = _Stage(objective, states, momentum, solver, options, tolerance, capacity)
        if known is not None:
            stage.append_known(*known)
            known = None
        left = stage.make_steps(left)
        momentum = stage.momentum_vector() if left else None
        first = stage.first if first is None else first
        states = stage.final_states()
    return states, first


class _Stage:
    """The solve while one basis lasts.

    Host matrices, first dimension the block if there is one: ``GV`` = <F, K F>, the pullbacks'
    inner products; ``YY`` = <K F, K F>; ``QY`` = <q, K F>; ``FF`` = <F, F>; ``qd`` = <q, d_0>.
    ``exact`` are the coefficients at which d was last split, with ``rest`` outside the basis.
    """

    def __init__(
        self,
        objective: Objective,
        states: States,
        momentum: Tensor | None,
        solver: InnerSolver,
        options: SolverOptions,
        tolerance: float,
        capacity: int,
    ) -> None:
        self.objective, self.blocks, self.start = objective, objective.blocks, states
        self.space = self.blocks.space
        self.options, self.tolerance = options, tolerance
        self.inner_momentum = solver.momentum_of(options)
        self.first: Tensor | None = None
        g = self.blocks.rotate(states, objective.gradient)
        self.g = g
        self._work: Tensor | None = None
        own = Rows(g, 1 if momentum is None else 2)
        images, self.Q = Rows(g, capacity), Rows(g, capacity)
        self.shared = self._find_shared()
        if self.shared is not None:
            # At the start, d = d_0: mostly no product, but what is known combined.
            d = self.initial_control()
            self.first = quadratic_value(d, g, objective.product(d), self.space.dot)
            del d
            self.shared.release_answer()
            images, self.Q = self.shared.images, self.shared.directions
        self.own, self.images, self.F = own, images, JoinedRows(own, images)
        self.largest = self.rest = 0.0
        self.eps = torch.finfo(g.dtype).eps
        n = self.space.block_count
        self.GV, self.YY = (torch.zeros(n, 0, 0, **F64) for _ in range(2))
        self.QY, self.FF = torch.zeros(n, 0, 0, **F64), torch.zeros(0, 0, **F64)
        self.qd = torch.zeros(0, **F64)
        self.x = self.m = torch.zeros(n, 0, **F64)
        self._extend_matrices(own.adopt(g), own.count)
        if momentum is not None:  # a vector of its own, which no residual contains
            f = own.append_row().copy_(momentum)
            self._extend_matrices(f, own.count)
            self.m[:, -1] = 1
        self.exact = self.x  # the coefficients when d was last inside the basis
        for i in range(self.Q.count):  # known already
            self._append_pair(i)

    def _find_shared(self) -> RecycledProduct | None:
        """Return what keeps directions and images already, in the coordinates of this solve."""
        product = self.objective.product
        rotates = any(part.rotates for part in self.blocks.parts)
        if rotates or self.objective.damping or not isinstance(product, RecycledProduct):
            return None
        return product

    @property
    def work(self) -> Tensor:
        """A vector to work in, which is let go of while a product takes its memory."""
        if self._work is None:
            self._work = torch.empty_like(self.g)
        return self._work

    def initial_control(self) -> Tensor:
        """Return d_0 = -U g, in the coordinates of the solve."""
        return self.blocks.act_rotated(self.start, self.g).neg_()

    def make_steps(self, steps: int) -> int:
        """Make up to ``steps`` inner steps; return how many are left when the basis is full."""
        mu = self.inner_momentum
        for done in range(steps):
            c = self.qd - torch.einsum("lij,lj->i", self.QY, self.x)
            allowed = self._allowed_outside(c)
            if self._bound_outside() > allowed:
                length = self._write_part_outside()
                if length > allowed:
                    if self.Q.count and self.objective.is_spent():
                        return 0
                    if self.Q.full:
                        return steps - done
                    self._append_product(length)
                    c = pad(c, (0, 1), value=length)
            self.m = mu * self.m + self._clip_per_block(self._residual_on_images(c))
            self.x = self.x + self.options.lr * self.m
        return 0

    def append_known(self, u: Tensor, image: Tensor) -> None:
        """Begin with a direction whose image under C + damping is known."""
        self.first = quadratic_value(u, self.objective.gradient, image, self.space.dot)
        if self.shared is not None:
            return  # which knows it
        length = self.space.dot(u, u).sqrt().clamp(min=torch.finfo(u.dtype).tiny)
        q, f = self.Q.append_row(), self.images.append_row()
        torch.div(self.blocks.rotate(self.start, u), length, out=q)
        torch.div(self.blocks.rotate(self.start, image), length, out=f)
        self._append_pair(self.Q.count - 1)

    def final_states(self) -> States:
        """Return the states that the coefficients stand for, and let go of the vectors."""
        change = self.blocks.pull_rotated(self.g, self._combine_images(self.x))
        del self.F, self.own, self.images, self.Q, self.g, self._work
        return [
            {**state, **{k: state[k] + v for k, v in entries.items()}}
            for state, entries in zip(self.start, change, strict=True)
        ]

    def momentum_vector(self) -> Tensor:
        """Return the vector that the momentum is the pullback of."""
        return self._combine_images(self.m).clone()

    def _residual_on_images(self, c: Tensor) -> Tensor:
        """Return the coefficients of g + (C + damping) d on F, for d = Q c."""
        a = torch.zeros(len(self.FF), **F64)
        a[0] = 1
        a[len(a) - len(c) :] = c
        return a

    def _clip_per_block(self, a: Tensor) -> Tensor:
        """Return each block's coefficients after its gradient was clipped to norm ``clip``."""
        if self.options.clip is None:
            return a.expand_as(self.x)
        norms = torch.einsum("i,lij,j->l", a, self.GV, a).clamp(min=0).sqrt()
        return (self.options.clip / norms.clamp(min=self.options.clip))[:, None] * a

    def _allowed_outside(self, c: Tensor) -> float:
        """Return how long the part of d outside the basis may be (all of d needs a product)."""
        if not self.Q.count:
            return -1.0
        return longest_negligible(
            self.tolerance, self._residual_on_images(c), self.FF, self.largest
        )

    def _bound_outside(self) -> float:
        """Return a bound, from the coefficients alone, on the part of d outside the basis."""
        dx = self.x - self.exact
        whole = float(torch.einsum("li,lij,lj->", dx, self.YY, dx))
        inside = float(torch.einsum("lij,lj->i", self.QY, dx).square().sum())
        # The difference cancels, and so do the terms of either; sums in pieces keep that many
        # digits of the terms, and what the others may hide counts as outside.
        sizes = self.YY.diagonal(dim1=1, dim2=2).sqrt() * dx.abs()
        hidden = self.eps / 4 * float(sizes.sum(1).square().sum())
        return self.rest + math.sqrt(max(whole - inside, 0.0) + hidden)

    def _write_part_outside(self) -> float:
        """Write the part of d outside the basis into the work vector; return its length."""
        self._work = None  # before it is needed, its memory serves U g
        d0 = self.initial_control()
        d = self._combine_images(self.x)
        self.blocks.kernel_product(self.g, d, d)
        torch.sub(d0, d, out=d)
        # What d is computed from, and so what its rounding is a part of.
        whole = torch.maximum(self.space.dot(d, d), self.space.dot(d0, d0))
        del d0
        # A second pass: in float32 one leaves the rest visibly oblique to the basis.
        for _ in range(2 if self.Q.count else 0):
            self.Q.subtract_combination(self.Q.map_matrices(lambda q: self.space.dot(q, d)), d)
        norm, length = torch.stack([whole, self.space.dot(d, d)]).sqrt().tolist()
        self.exact = self.x
        # What is left by rounding has no direction.
        self.rest = length if length > 32 * self.eps * norm or not self.Q.count else 0.0
        return self.rest

    def _append_product(self, length: float) -> None:
        """Extend the basis by the part of d outside it, which is in the work vector."""
        q = self.Q.take(self.work.div_(length or 1.0))
        self._work = None
        if self.shared is not None:
            self.shared.append_image()
        else:
            image = self.objective.product(self.blocks.rotate_back(self.start, q))
            rotated = self.blocks.rotate(self.start, image)
            del image
            f = self.images.take(rotated.add_(q, alpha=self.objective.damping))
            del rotated
            if self.first is None:
                # d_0 = length q, so its image is length F.
                self.first = quadratic_value(
                    self.initial_control(), self.g, f, self.space.dot, length
                )
        self._append_pair(self.Q.count - 1)
        self.exact, self.rest = self.x, 0.0

    def _append_pair(self, i: int) -> None:
        """Extend the host matrices by the pair i of direction and image."""
        q, f = self.Q.matrices(i + 1)[-1][-1], self.images.matrices(i + 1)[-1][-1]
        self._extend_matrices(f, self.own.count + i + 1, q, i + 1)
        # How far d_0 lies from the basis is not known yet.
        self.exact, self.rest = self.x, math.inf

    def _extend_matrices(
        self, f: Tensor, count: int, q: Tensor | None = None, directions: int = 0
    ) -> None:
        """Extend the host matrices by F number ``count``, and by q; one read from the device."""
        F, Q = self.F, self.Q
        y = self.work
        gram, dot, kernel_product = (
            self.space.dots_per_block,
            self.space.dot,
            self.blocks.kernel_product,
        )
        new = {"FF": F.map_matrices(lambda rows: dot(rows, f), count)}
        kernel_product(self.g, f, y)
        new["GV"] = F.map_matrices(lambda rows: gram(rows, y), count)
        if directions:
            new["QY"] = Q.map_matrices(lambda rows: gram(rows, y), directions)
        kernel_product(self.g, y, y)
        new["YY"] = F.map_matrices(lambda rows: gram(rows, y), count)
        if q is not None:
            kernel_product(self.g, q, y)
            new["Yq"] = F.map_matrices(lambda rows: gram(rows, y), count)
            del y
            self._work = None  # its memory is the control's
            new["qd"] = dot(q, self.initial_control())[None]
        host = _read_from_device(new)
        self.FF = append_border(self.FF, host["FF"])
        self.GV = append_border(self.GV, host["GV"])
        self.YY = append_border(self.YY, host["YY"])
        blocks, rows, columns = self.QY.shape
        larger = self.QY.new_zeros(blocks, rows + int(q is not None), columns + 1)
        larger[:, :rows, :columns] = self.QY  # pad() of torch 2.9 refuses what has no rows
        self.QY = larger
        if directions:
            self.QY[:, :, -1] = host["QY"]
        self.x, self.m = pad(self.x, (0, 1)), pad(self.m, (0, 1))
        if q is not None:
            self.QY[:, -1] = host["Yq"]
            self.qd = torch.cat([self.qd, host["qd"]])
            self.largest = max(self.largest, math.sqrt(float(self.FF[-1, -1])))

    def _combine_images(self, coefficients: Tensor) -> Tensor:
        """Return the combination of F with coefficients of each block, in the work vector."""
        c = coefficients.to(self.work.dtype).to(self.work.device)  # narrowed on the host
        self.work.zero_()
        start = 0
        for rows in self.F.matrices():
            self.space.add_combination(c[:, start : start + len(rows)], rows, self.work)
            start += len(rows)
        return self.work


def _read_from_device(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in float64 on the host, with one transfer."""
    # Widened on the host, since not every device has float64.
    flat = torch.cat([v.reshape(-1) for v in values.values()]).cpu().double()
    parts = torch.split(flat, [v.numel() for v in values.values()])
    return {k: part.view(v.shape) for (k, v), part in zip(values.items(), parts, strict=True)}
