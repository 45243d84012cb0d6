r"""The inner solve of any structure, with everything kept between its steps that can be.

The same steps as the literal loop (:func:`llqr.geometry._solver.solve`) with momentum, in other
coordinates where those are cheaper. Between the value and the gradient of one step nothing is
computed twice, results go to buffers made once (fresh memory costs more than the arithmetic of a
small block), and equal blocks are one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._blocks import States
from ._ekfac import EKfac
from ._solver import Objective, SolverOptions
from ._structure import State, Structure
from ._structures import DiagKfac, Kfac

__all__ = ["solve_buffered"]


def solve_buffered(
    objective: Objective, states: States, options: SolverOptions
) -> tuple[States, Tensor]:
    """Do what :func:`solve` does, for the solvers "momentum" and "sgd".

    Args:
        objective: J; its product returns a new vector.
        states: where the solve starts; not changed.
        options: how to solve.

    Returns:
        The new states and J at the old ones.
    """
    blocks, g, damping = objective.blocks, objective.gradient, objective.damping
    u, first = torch.empty_like(g), None
    inners = [
        inner_of(part, state, part.group.own(g))
        for part, state in zip(blocks.parts, states, strict=True)
    ]
    for _ in range(options.steps):
        for inner in inners:
            inner.write(inner.group.view(u))
        u.neg_()
        r = objective.product(u)
        if damping:
            r.add_(u, alpha=damping)
        if first is None:
            first = blocks.layout.dot(u, torch.add(g, r, alpha=0.5))
        r.add_(g).neg_()  # the pullback is of u = -U g
        for inner in inners:
            inner.step(inner.group.own(r), options)
    assert first is not None
    return [inner.state() for inner in inners], first


class Inner:
    """The steps of one group: U x, then a step along the pullback of r (for any structure)."""

    def __init__(self, structure: Structure, state: State, x: Tensor) -> None:
        self.structure, self.group, self.x = structure, structure.group, x
        self.begin = state
        self.entries = self._entries()
        self.momenta = {k: torch.zeros_like(v) for k, v in self.entries.items()}
        self.buffers: dict[str, Tensor] = {}

    def _entries(self) -> State:
        """Return copies of what moves."""
        return {k: self.begin[k].clone() for k in self.structure.trainable}

    def state(self) -> State:
        """Return the state that was reached."""
        return {**self.begin, **self.entries}

    def control(self, out: Tensor) -> None:
        """Write U x."""
        out.copy_(self.structure.apply({**self.begin, **self.entries}, self.x))

    def gradient(self, r: Tensor) -> State:
        """Return the pullback of r, at the state of the last :meth:`control`."""
        return self.structure.pullback({**self.begin, **self.entries}, self.x, r)

    def norms(self, key: str, leaves: Tensor) -> Tensor:
        """Return the norm of each leaf's gradient, from one row a leaf."""
        norms: Tensor = torch.linalg.vector_norm(leaves, dim=1)
        return norms

    def write(self, out: Tensor) -> None:
        """Write U x, in whatever precision ``out`` has."""
        if out.dtype == self.x.dtype:
            self.control(out)
        else:
            mine = self._buffer("control", *self.x.shape)
            self.control(mine)
            out.copy_(mine)

    def step(self, r: Tensor, options: SolverOptions) -> None:
        """Move the entries along the clipped gradients' momentum."""
        mu = options.momentum if options.solver == "momentum" else 0.0
        for key, entry in self.gradient(r).items():
            if options.clip is not None:
                self._clip(key, entry, options.clip)
            self.momenta[key].mul_(mu).add_(entry)
            self.entries[key].sub_(self.momenta[key], alpha=options.lr)

    def _clip(self, key: str, gradient: Tensor, clip: float) -> None:
        """Scale each leaf to norm at most ``clip``, in place: g c / max(c, |g|)."""
        for leaves in self.structure.batches(gradient):
            leaves.mul_((clip / self.norms(key, leaves).clamp(min=clip))[:, None])

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Return the same memory for the same name."""
        if name not in self.buffers:
            self.buffers[name] = self.x.new_empty(shape)
        return self.buffers[name]


class InnerDiagKfac(Inner):
    """U X = b_i X_ij a_j, with one buffer."""

    def control(self, out: Tensor) -> None:
        """Write b_i X_ij a_j."""
        torch.mul(self.x, self.entries["A"][:, None, :], out=out)
        out.mul_(self.entries["B"][:, :, None])

    def gradient(self, r: Tensor) -> State:
        """Return dA_j = sum_i b_i X_ij R_ij and dB_i = sum_j X_ij R_ij a_j."""
        xr = torch.mul(self.x, r, out=self._buffer("xr", *self.x.shape))
        dA = torch.bmm(self.entries["B"][:, None, :], xr)[:, 0]
        # The vector on the left: a batch of GEMVs takes several times as long.
        dB = torch.bmm(self.entries["A"][:, None, :], xr.mT)[:, 0]
        return {"A": dA, "B": dB}


class InnerKfac(Inner):
    r"""U X = B X A' with the factor of the wider side kept as what changed it.

    For m <= n every gradient of A is dA = R'B X, so A = A_0 + Z X with Z of X's size (n x m), and
    the momentum is kept on Z:

        X A' = X A_0' + (X X') Z',    dZ = R'B,    dB = R (X A')',    |dA|^2 = tr(dZ'dZ X X').

    8 m^2 n operations a step in place of 6 m^2 n + 4 m n^2; A is formed once, at the end. A tall
    X is the transposed case: U X = (A X' B')', with A and B changing places.
    """

    def _entries(self) -> State:
        tall = self.x.shape[1] > self.x.shape[2]
        self.wide, self.narrow = ("B", "A") if tall else ("A", "B")
        self.tall = tall
        x = self.x.mT if tall else self.x
        b, m, n = x.shape
        self.fixed = torch.bmm(x, self.begin[self.wide].mT)  # X A_0'
        self.square = torch.bmm(x, x.mT)  # X X'
        self.length = torch.linalg.matrix_norm(self.square).sqrt()  # at least X's spectral norm
        return {"Z": x.new_zeros(b, n, m), self.narrow: self.begin[self.narrow].clone()}

    def state(self) -> State:
        """Return the factors, the wide one formed as A_0 + Z X."""
        x = self.x.mT if self.tall else self.x
        wide = torch.baddbmm(self.begin[self.wide], self.entries["Z"], x)
        return {**self.begin, self.wide: wide, self.narrow: self.entries[self.narrow]}

    def control(self, out: Tensor) -> None:
        """Write B (X A')."""
        xa = self._buffer("xa", *self.fixed.shape)
        torch.baddbmm(self.fixed, self.square, self.entries["Z"].mT, out=xa)
        if self.tall:
            torch.bmm(xa.mT, self.entries[self.narrow].mT, out=out)
        else:
            torch.bmm(self.entries[self.narrow], xa, out=out)

    def gradient(self, r: Tensor) -> State:
        """Return dZ = R'B and dB = R (X A')'."""
        r = r.mT if self.tall else r
        z, b = self.entries["Z"], self.entries[self.narrow]
        dz = torch.bmm(r.mT, b, out=self._buffer("dz", *z.shape))
        db = torch.bmm(r, self.buffers["xa"].mT, out=self._buffer("db", *b.shape))
        return {"Z": dz, self.narrow: db}

    def norms(self, key: str, leaves: Tensor) -> Tensor:
        """Return the norms, for Z those of Z X (zero where all are below the clip)."""
        plain = super().norms(key, leaves)
        if key != "Z":
            return plain
        if not bool((plain * self.length > self.limit).any()):
            return torch.zeros_like(plain)
        z = leaves.view_as(self.entries["Z"])
        image = torch.bmm(z, self.square, out=self._buffer("image", *z.shape))
        return image.mul_(z).sum((1, 2)).clamp_(min=0).sqrt_()

    def step(self, r: Tensor, options: SolverOptions) -> None:
        """Move Z and the narrow factor."""
        self.limit = math.inf if options.clip is None else options.clip
        super().step(r, options)


class InnerEKfac(Inner):
    """U X = QB (S o (QB' X QA)) QA' with learned bases; a step turns X and R once."""

    def control(self, out: Tensor) -> None:
        """Write QB (S o (QB' X QA)) QA'."""
        qa, qb, s = self.entries["QA"], self.entries["QB"], self._eigenvalues()
        shape = self.x.shape
        xq = torch.bmm(self.x, qa, out=self._buffer("xq", *shape))
        xh = torch.bmm(qb.mT, xq, out=self._buffer("xh", *shape))
        sx = torch.mul(s, xh, out=self._buffer("sx", *shape))
        left = torch.bmm(qb, sx, out=self._buffer("left", *shape))
        torch.bmm(left, qa.mT, out=out)

    def gradient(self, r: Tensor) -> State:
        """Return the gradients in S and the bases; each basis acts twice."""
        qa, qb, s = self.entries["QA"], self.entries["QB"], self._eigenvalues()
        shape, held = self.x.shape, self.buffers
        rq = torch.bmm(r, qa, out=self._buffer("rq", *shape))
        rh = torch.bmm(qb.mT, rq, out=self._buffer("rh", *shape))
        ds = torch.mul(held["xh"], rh, out=self._buffer("ds", *shape))
        if self.square:
            ds.mul_(self.entries["S"]).mul_(2)
        sr = rh.mul_(s)
        dqb = torch.bmm(rq, held["sx"].mT, out=self._buffer("dqb", *qb.shape))
        dqb.baddbmm_(held["xq"], sr.mT)
        dqa = torch.bmm(r.mT, held["left"], out=self._buffer("dqa", *qa.shape))
        dqa.baddbmm_(self.x.mT, torch.bmm(qb, sr, out=held["rq"]))
        return {"QA": dqa, "QB": dqb, "S": ds}

    def _entries(self) -> State:
        assert isinstance(self.structure, EKfac)
        self.square = self.structure.square
        return super()._entries()

    def _eigenvalues(self) -> Tensor:
        return self.entries["S"].square() + 1e-12 if self.square else self.entries["S"]


def inner_of(structure: Structure, state: State, x: Tensor) -> Inner:
    """Return the steps of a structure."""
    kinds = {DiagKfac: InnerDiagKfac, Kfac: InnerKfac, EKfac: InnerEKfac}
    kind = kinds.get(type(structure), Inner)
    if isinstance(structure, EKfac) and not structure.learned:
        kind = Inner
    return kind(structure, state, x)
