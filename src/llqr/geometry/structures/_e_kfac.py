"""Eigenvalue-corrected Kronecker factors, with bases that are learned or follow the gradient.

U X = QB (S o (QB' X QA)) QA'. Four classes, by two settings: who makes the bases ("learned" in the
solve, or eigenvectors of averaged gradients), and whether S is stored as it is or as a root.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._application import Application, compress_factors, multiply_left, multiply_right
from ._base import Bounds, State, Structure
from ._eigenvalues import (
    LANCZOS_STEPS,
    decompose_symmetric,
    extremes_of_operator,
    nearest_orthogonal,
)
from ._inner_step import InnerStep
from ._low_rank import span_of_columns

__all__ = [
    "EKfac",
    "EKfacGradientBases",
    "SquareEKfac",
    "SquareEKfacGradientBases",
    "squared_overlaps",
]


#: Entries of the blocks whose eigenvalues are estimated at a time.
ESTIMATED_AT_ONCE = 2**20


class EKfac(Structure):
    """Eigenvalue-corrected Kronecker factors: U X = QB (S o (QB' X QA)) QA', bases learned."""

    name: ClassVar[str] = "e-kfac"
    cut: ClassVar[CutRule] = "rectangles"
    trainable: ClassVar[tuple[str, ...]] = ("QA", "QB", "S")
    rotates: ClassVar[bool] = True
    basis_entries: ClassVar[tuple[str, ...]] = ("QA", "QB")

    @classmethod
    def variant(cls, *, bases: str, constraint: str) -> type[Structure]:
        """Return the class for these bases and this constraint; a class of one's own stays."""
        if cls is EKfac:
            return _VARIANTS[bases == "gradient", constraint == "square"]
        if issubclass(cls, SquareEKfac):
            return cls
        return super().variant(bases=bases, constraint=constraint)

    def identity(self, device: torch.device) -> State:
        """Return identity bases and unit eigenvalues."""
        m, n = self.group.matrix_shape
        return {
            "QA": self.batch_of_identities(n, device),
            "QB": self.batch_of_identities(m, device),
            "S": self.batch_of_ones(m, n, device=device),
        }

    # S is what the state stores; the eigenvalues of U are a function of it.

    @staticmethod
    def eigenvalues_from(s: Tensor) -> Tensor:
        """Return the eigenvalues of U: S itself."""
        return s

    @staticmethod
    def store_eigenvalues(values: Tensor) -> Tensor:
        """Return the S whose eigenvalues these are."""
        return values

    @staticmethod
    def chain_eigenvalues_(ds: Tensor, s: Tensor) -> Tensor:
        """Return the gradient in S, from that in the eigenvalues (in place)."""
        return ds

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return QB (S o (QB' X QA)) QA'."""
        return self.rotate_back(state, self.act_rotated(state, self.rotate(state, x)))

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradients in S and the bases; each basis acts twice."""
        qa, qb, s = state["QA"], state["QB"], self.eigenvalues_from(state["S"])
        # u' = QB (S o (QB' X QA)) QA': the intermediate results that both terms need.
        x_qa, r_qa = x @ qa, r @ qa
        xh, rh = qb.mT @ x_qa, qb.mT @ r_qa  # x and r in the bases
        sx, sr = s * xh, s * rh
        # The product rule: a basis rotates x into it, and the result out of it.
        return {
            "QA": r.mT @ (qb @ sx) + x.mT @ (qb @ sr),
            "QB": r_qa @ sx.mT + x_qa @ sr.mT,
            "S": self.chain_eigenvalues_(xh * rh, state["S"]),
        }

    def with_orthogonal_bases(self, state: State) -> State:
        """Return the state with the nearest orthogonal bases to those that a solve has trained."""
        trained = [q for q in self.basis_entries if q in self.trainable]
        return {**state, **{q: nearest_orthogonal(state[q]) for q in trained}}

    def rotate(self, state: State, x: Tensor) -> Tensor:
        """Return QB' X QA, (m, m) @ (m, n) @ (n, n)."""
        return multiply_right(state, "QA", multiply_left(state, "QB", x, transposed=True))

    def rotate_back(self, state: State, x: Tensor) -> Tensor:
        """Return QB X QA'."""
        return multiply_right(state, "QA", multiply_left(state, "QB", x), transposed=True)

    def act_rotated(self, state: State, x: Tensor) -> Tensor:
        """Return S o x."""
        return self.eigenvalues_from(state["S"]) * x

    def project(self, state: State, bounds: Bounds) -> State:
        """Replace the bases by their nearest orthogonal matrices, carry S over, clamp it.

        What the solve did to the lengths of the bases is part of U; S takes it up.
        """
        new = self.with_orthogonal_bases(state)
        turn_b, turn_a = squared_overlaps(state, new)
        values = turn_b @ self.eigenvalues_from(state["S"]) @ turn_a.mT
        new["S"] = self.store_eigenvalues(values.clamp(*bounds))
        return new

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S, or of the whole operator if the bases are skewed."""
        s = self.eigenvalues_from(state["S"])
        # The solve does not keep the bases orthogonal; only then S is not the spectrum.
        skew = max(
            float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max())
            for q in (state["QA"], state["QB"])
        )
        if skew < (1e-6 if exact else 1e-3):
            return s.amin((1, 2)), s.amax((1, 2))
        # An estimate keeps two dozen vectors: of a few blocks at a time.
        at_once = self._estimated_at_once
        ends = [
            self._extremes_of_skewed({k: v[i : i + at_once] for k, v in state.items()}, exact)
            for i in range(0, self.count, at_once)
        ]
        return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])

    def estimate_bytes(self) -> int:
        """Return the vectors of an estimate, of the blocks that are taken at a time."""
        entries = min(self.count, self._estimated_at_once) * math.prod(self.group.matrix_shape)
        return (LANCZOS_STEPS + 4) * entries * self.group.dtype.itemsize

    @property
    def _estimated_at_once(self) -> int:
        """The blocks whose eigenvalues are estimated together."""
        return max(1, ESTIMATED_AT_ONCE // max(1, math.prod(self.group.matrix_shape)))

    def _extremes_of_skewed(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme eigenvalues of some of the blocks, from their action."""
        return extremes_of_operator(lambda x: self.apply(state, x), state["S"], exact)

    def applied_form(self, state: State, application: Application) -> State:
        """Return the bases as I + L R': those that are learned stay near the identity for long."""
        if application != "low-rank":
            return state
        entries = self.count * math.prod(self.group.matrix_shape)
        return compress_factors(state, {"QA": 4, "QB": 4}, entries, symmetric=False)

    def inner_step(self, state: State, x: Tensor) -> InnerStep:
        """Return the steps that rotate X and R once each."""
        return EKfacStep(self, state, x)


class EKfacGradientBases(EKfac):
    """E-kfac whose bases are eigenvectors of averaged X X' and X'X of the refresh gradients.

    Only S is learned, and U is linear in it. L and R are the running averages.
    """

    trainable: ClassVar[tuple[str, ...]] = ("S",)
    linear: ClassVar[bool] = True
    renews_bases: ClassVar[bool] = True
    decay: ClassVar[float] = 0.95

    def identity(self, device: torch.device) -> State:
        """Return identity bases, unit eigenvalues and empty averages."""
        state = super().identity(device)
        return {**state, "L": torch.zeros_like(state["QB"]), "R": torch.zeros_like(state["QA"])}

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradient in S."""
        ds = self.rotate(state, x) * self.rotate(state, r)
        return {"S": self.chain_eigenvalues_(ds, state["S"])}

    def pull_rotated(self, x: Tensor, r: Tensor) -> State:
        """Return x o r, the gradient in S."""
        return {"S": x * r}

    def kernel_product(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x o x o r."""
        torch.mul(x, r, out=out).mul_(x)

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp S; the bases are orthogonal."""
        values = self.eigenvalues_from(state["S"])
        return {**state, "S": self.store_eigenvalues(values.clamp(*bounds))}

    def renew_bases(self, state: State, x: Tensor, first: bool, renew: bool) -> State:
        """Average X X' and X'X of a refresh gradient; rotate the bases to their eigenvectors.

        S is carried over as the diagonal of the old operator in the new bases, so it stays within
        the same bounds.
        """
        keep = 0.0 if first else self.decay  # the first gradient starts the averages
        new = {
            **state,
            "L": keep * state["L"] + (1 - keep) * (x @ x.mT),
            "R": keep * state["R"] + (1 - keep) * (x.mT @ x),
        }
        if not renew:
            return new
        # Contiguous, as a checkpoint brings them back: products round by the strides.
        new["QB"], new["QA"] = (decompose_symmetric(new[k])[1].contiguous() for k in "LR")
        # The squares of an orthogonal matrix are doubly stochastic; undo rounding in that.
        turn_b, turn_a = (t / t.sum(-1, keepdim=True) for t in squared_overlaps(state, new))
        values = turn_b @ self.eigenvalues_from(state["S"]) @ turn_a.mT
        new["S"] = self.store_eigenvalues(values)
        return new

    def inner_step(self, state: State, x: Tensor) -> InnerStep:
        """Return the general steps."""
        return InnerStep(self, state, x)


class SquareEKfac(EKfac):
    """The authors' psd-e-kfac: S^2 + 1e-12 in the place of S, which keeps U positive definite."""

    @staticmethod
    def eigenvalues_from(s: Tensor) -> Tensor:
        """Return S^2 + 1e-12."""
        return s.square() + 1e-12

    @staticmethod
    def store_eigenvalues(values: Tensor) -> Tensor:
        """Return the root."""
        return values.sqrt()

    @staticmethod
    def chain_eigenvalues_(ds: Tensor, s: Tensor) -> Tensor:
        """Return 2 S o the gradient in the eigenvalues (in place)."""
        return ds.mul_(s).mul_(2)


class SquareEKfacGradientBases(SquareEKfac, EKfacGradientBases):
    """psd-e-kfac in bases that follow the gradient; U is not linear in S."""

    trainable: ClassVar[tuple[str, ...]] = ("S",)
    linear: ClassVar[bool] = False


_VARIANTS: dict[tuple[bool, bool], type[Structure]] = {
    (False, False): EKfac,
    (True, False): EKfacGradientBases,
    (False, True): SquareEKfac,
    (True, True): SquareEKfacGradientBases,
}


class EKfacStep(InnerStep):
    """U X = QB (S o (QB' X QA)) QA' with learned bases; a step rotates X and R once.

    A gradient of low rank is X = P Y with orthonormal columns P (m x k): what multiplies X then
    multiplies k rows or columns. Five of the eleven products become cheaper by m / k.
    """

    def __init__(self, structure: EKfac, state: State, x: Tensor) -> None:
        super().__init__(structure, state, x)
        self.e_kfac = structure
        self.span = span_of_columns(x)
        self.y = x if self.span is None else torch.bmm(self.span.mT, x)

    def compute_control(self, out: Tensor) -> None:
        """Write QB (S o (QB' X QA)) QA', keeping what the gradient needs."""
        qa, qb, s = self.entries["QA"], self.entries["QB"], self._eigenvalues()
        shape, buffer = self.x.shape, self.reuse_buffer
        yq = torch.bmm(self.y, qa, out=buffer("yq", *self.y.shape))
        pq = qb
        if self.span is not None:
            pq = torch.bmm(self.span.mT, qb, out=buffer("pq", len(qb), *self.span.mT.shape[1:]))
        xh = torch.bmm(pq.mT, yq, out=buffer("xh", *shape))  # QB' X QA = (P'QB)' (Y QA)
        sx = torch.mul(s, xh, out=buffer("sx", *shape))
        left = torch.bmm(qb, sx, out=buffer("left", *shape))
        torch.bmm(left, qa.mT, out=out)

    def compute_gradient(self, r: Tensor) -> State:
        """Return the gradients in S and the bases; each basis acts twice."""
        qa, qb, s = self.entries["QA"], self.entries["QB"], self._eigenvalues()
        shape, buffer, held = self.x.shape, self.reuse_buffer, self.buffers
        # Each basis acts twice, so its gradient has two terms (see EKfac.pullback).
        rq = torch.bmm(r, qa, out=buffer("rq", *shape))
        rh = torch.bmm(qb.mT, rq, out=buffer("rh", *shape))
        ds = torch.mul(held["xh"], rh, out=buffer("ds", *shape))
        ds = self.e_kfac.chain_eigenvalues_(ds, self.entries["S"])
        sr = rh.mul_(s)  # in the memory of rh, which is not needed any more
        dqb = torch.bmm(rq, held["sx"].mT, out=buffer("dqb", *qb.shape))
        dqa = torch.bmm(r.mT, held["left"], out=buffer("dqa", *qa.shape))
        if self.span is None:
            dqb.baddbmm_(held["yq"], sr.mT)
            dqa.baddbmm_(self.x.mT, torch.bmm(qb, sr, out=held["rq"]))
        else:  # X QA (S o RH)' = P (Y QA (S o RH)'),  X'QB (S o RH) = Y' (P'QB (S o RH))
            dqb.baddbmm_(
                self.span, torch.bmm(held["yq"], sr.mT, out=buffer("ys", *held["pq"].shape))
            )
            dqa.baddbmm_(self.y.mT, torch.bmm(held["pq"], sr, out=held["yq"]))
        return {"QA": dqa, "QB": dqb, "S": ds}

    def _eigenvalues(self) -> Tensor:
        return self.e_kfac.eigenvalues_from(self.entries["S"])


def squared_overlaps(old: State, new: State) -> tuple[Tensor, Tensor]:
    """Return what takes S to the diagonal of the old operator in orthogonal new bases.

    With it the new operator is the nearest to the old one that these bases allow.
    """
    turn_b, turn_a = (torch.square(new[k].mT @ old[k]) for k in ("QB", "QA"))
    return turn_b, turn_a
