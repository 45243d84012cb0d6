"""Eigenvalue-corrected Kronecker factors, with bases that are learned or follow the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._pieces import Group
from ._spectra import eigh, operator_extremes, polar
from ._structure import Bounds, State, Structure, matrix_of

__all__ = ["EKfac"]


class EKfac(Structure):
    """Eigenvalue-corrected Kronecker factors: U X = QB (S o (QB' X QA)) QA'.

    ``square`` puts raw^2 + 1e-12 in the place of S (the authors' psd-e-kfac). With fixed bases
    only S is trainable and U is linear in it; L and R are the running averages of X X' and X'X
    that the bases are the eigenvectors of.
    """

    decay = 0.95

    def __init__(self, group: Group, *, learned: bool = True, square: bool = False) -> None:
        super().__init__(group)
        self.learned, self.square = learned, square
        self.trainable = ("QA", "QB", "S") if learned else ("S",)
        self.linear = not learned and not square

    def identity(self, device: torch.device) -> State:
        """Return identity bases and unit eigenvalues."""
        m, n = matrix_of(self.group)
        state = {"QA": self._eyes(n, device), "QB": self._eyes(m, device)}
        state["S"] = self._ones(m, n, device=device)
        if not self.learned:
            state["L"] = torch.zeros_like(state["QB"])
            state["R"] = torch.zeros_like(state["QA"])
        return state

    def _eigenvalues(self, state: State) -> Tensor:
        return state["S"].square() + 1e-12 if self.square else state["S"]

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return QB (S o (QB' X QA)) QA'."""
        return self.turn_back(state, self.act(state, self.turn(state, x)))

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradients in S and, if they are learned, in the bases."""
        qa, qb, s = state["QA"], state["QB"], self._eigenvalues(state)
        x_qa, r_qa = x @ qa, r @ qa
        xh, rh = qb.mT @ x_qa, qb.mT @ r_qa  # x and r in the bases
        ds = xh * rh * (2 * state["S"] if self.square else 1)
        if not self.learned:
            return {"S": ds}
        sx, sr = s * xh, s * rh
        # Each basis acts twice: turning x into the basis, and the result out of it.
        dqb = r_qa @ sx.mT + x_qa @ sr.mT
        dqa = r.mT @ (qb @ sx) + x.mT @ (qb @ sr)
        return {"QA": dqa, "QB": dqb, "S": ds}

    def turn(self, state: State, x: Tensor) -> Tensor:
        """Return QB' X QA."""
        return state["QB"].mT @ x @ state["QA"]

    def turn_back(self, state: State, x: Tensor) -> Tensor:
        """Return QB X QA'."""
        return state["QB"] @ x @ state["QA"].mT

    def act(self, state: State, x: Tensor) -> Tensor:
        """Return S o x."""
        return self._eigenvalues(state) * x

    def pull(self, x: Tensor, r: Tensor) -> State:
        """Return x o r, the gradient in S."""
        return {"S": x * r}

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x o x o r."""
        torch.mul(x, r, out=out).mul_(x)

    def project(self, state: State, bounds: Bounds) -> State:
        """Replace learned bases by their nearest orthogonal matrices, carry S over, clamp it.

        What the solve did to the lengths of the bases is part of U; S takes it up.
        """
        new = dict(state)
        if self.learned:
            new["QB"], new["QA"] = polar(state["QB"]), polar(state["QA"])
            turn_b, turn_a = _turns(state, new)
            new["S"] = turn_b @ state["S"] @ turn_a.mT
        new["S"] = new["S"].clamp(*bounds)
        return new

    def renew(self, state: State, x: Tensor, first: bool, rotate: bool) -> State:
        """Average X X' and X'X of a refresh gradient; turn the bases to their eigenvectors.

        S is carried over as the diagonal of the old operator in the new bases, so it stays within
        the same bounds.
        """
        keep = 0.0 if first else self.decay
        new = {
            **state,
            "L": keep * state["L"] + (1 - keep) * (x @ x.mT),
            "R": keep * state["R"] + (1 - keep) * (x.mT @ x),
        }
        if not rotate:
            return new
        # Contiguous, as a checkpoint brings them back: products round by the strides.
        new["QB"], new["QA"] = (eigh(new[k])[1].contiguous() for k in "LR")
        # The squares of an orthogonal matrix are doubly stochastic; undo rounding in that.
        turn_b, turn_a = (t / t.sum(-1, keepdim=True) for t in _turns(state, new))
        new["S"] = turn_b @ state["S"] @ turn_a.mT
        return new

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extremes of S, or of the whole operator where the bases are skewed."""
        s = self._eigenvalues(state)
        skew = max(float((q.mT @ q - torch.eye(q.shape[-1]).to(q)).abs().max())
                   for q in (state["QA"], state["QB"]))  # fmt: skip
        if skew < 1e-3:
            return s.amin((1, 2)), s.amax((1, 2))
        return operator_extremes(lambda x: self.apply(state, x), s, exact)


def _turns(old: State, new: State) -> tuple[Tensor, Tensor]:
    """Return what takes S to the diagonal of the old operator in orthogonal new bases.

    With it the new operator is the nearest to the old one that these bases allow.
    """
    turn_b, turn_a = (torch.square(new[k].mT @ old[k]) for k in ("QB", "QA"))
    return turn_b, turn_a
