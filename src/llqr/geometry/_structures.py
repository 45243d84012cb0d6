"""The structures of U: how a block acts, how a residual pulls back to it, how it is kept positive.

A structure is a set of pure functions on a batch of equal blocks. With the control u = -U g, the
gradient of <r, U x> with respect to the state is ``pullback(state, x, r)``. The state is a dict of
tensors whose first dimension counts blocks (elementwise structures: one flat run).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._pieces import Group
from ._spectra import clip_eigenvalues, eigh, extreme_eigenvalues, operator_extremes, polar

__all__ = ["State", "Structure", "make_structure"]

State = dict[str, Tensor]
Bounds = tuple[float, float]


class Structure:
    """The functions of one structure on one group of blocks (base class, and the identity).

    Attributes:
        trainable: the state entries that the inner solve changes.
        linear: True when U is linear in the trainable entries.
    """

    trainable: tuple[str, ...] = ()
    linear = True

    def __init__(self, group: Group) -> None:
        self.group = group
        self.count = len(group.blocks)

    def identity(self, device: torch.device) -> State:
        """Return the state at which U is the identity."""
        return {}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x for the group's view x of a flat vector."""
        return x

    def lowered(self, state: State) -> State:
        """Return what :meth:`apply` takes for the state in lower precision (kfac alone)."""
        return state

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradient of <r, U x> in the trainable entries."""
        return {}

    def turn(self, state: State, x: Tensor) -> Tensor:
        """Return x in the fixed orthonormal coordinates in which a linear structure is simple."""
        return x

    def turn_back(self, state: State, x: Tensor) -> Tensor:
        """Undo :meth:`turn`."""
        return x

    def act(self, state: State, x: Tensor) -> Tensor:
        """Return U x, both in turned coordinates (linear structures)."""
        return self.apply(state, x)

    def pull(self, x: Tensor, r: Tensor) -> State:
        """Return the pullback of r at x, both turned; it depends on no state where U is linear."""
        return self.pullback({}, x, r)

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write what U x changes by along the pullback of r: ``act(pull(x, r), x)``.

        For a linear structure, all three in turned coordinates; ``out`` may be r.
        """
        out.zero_()

    def project(self, state: State, bounds: Bounds) -> State:
        """Return the nearest state with bounds[0] I <= U <= bounds[1] I."""
        return state

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest eigenvalue of each block."""
        ones = torch.ones(self.count)
        return ones, ones

    def leaves(self, entries: State) -> list[Tensor]:
        """Return one view a leaf (a tensor of one block), the unit of the gradient clip."""
        return [leaf for tensor in entries.values() for leaf in tensor.unbind(0)]

    def batches(self, entry: Tensor) -> list[Tensor]:
        """Return matrix views of a state entry, one row a leaf, leaves of one size together."""
        return [entry.view(len(entry), -1)]

    def blockwise(self, state: State) -> list[State]:
        """Return views of the state, one dict a block."""
        return [{k: v[i] for k, v in state.items()} for i in range(self.count)]

    def _ones(self, *shape: int, device: torch.device) -> Tensor:
        return torch.ones(self.count, *shape, dtype=self.group.dtype, device=device)

    def _eyes(self, n: int, device: torch.device) -> Tensor:
        return torch.eye(n, dtype=self.group.dtype, device=device).repeat(self.count, 1, 1)


class Diagonal(Structure):
    """One number an entry: U x = s o x."""

    trainable = ("U",)

    def identity(self, device: torch.device) -> State:
        """Return all ones."""
        return {"U": torch.ones(self.group.numel, dtype=self.group.dtype, device=device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return s o x."""
        return state["U"] * x

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return r o x."""
        return {"U": r * x}

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x o x o r."""
        torch.mul(x, r, out=out).mul_(x)

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp every entry."""
        return {"U": state["U"].clamp(*bounds)}

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the least and greatest entry of each block."""
        pairs = [part.aminmax() for part in self.leaves(state)]
        return torch.stack([p.min for p in pairs]), torch.stack([p.max for p in pairs])

    def leaves(self, entries: State) -> list[Tensor]:
        """Return the run of each block."""
        return list(torch.split(entries["U"], self.group.lengths))

    def batches(self, entry: Tensor) -> list[Tensor]:
        """Return the runs of blocks of one length."""
        return self.group.matrices(entry)

    def blockwise(self, state: State) -> list[State]:
        """Return the run of each block."""
        return [{"U": leaf} for leaf in self.leaves(state)]


class Scalar(Structure):
    """One number a layer: U x = s x."""

    trainable = ("U",)

    def identity(self, device: torch.device) -> State:
        """Return all ones."""
        return {"U": self._ones(device=device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return s x, block by block."""
        counts = [count for count, _ in self.group.runs]
        factors = torch.split(state["U"], counts)
        parts = zip(self.group.matrices(x), factors, strict=True)
        return torch.cat([(f[:, None] * part).view(-1) for part, f in parts])

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return <r, x>, block by block."""
        return {"U": torch.cat([part.sum(1) for part in self.group.matrices(r * x)])}

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write x <r, x>, block by block."""
        torch.mul(x, r, out=out)
        for part, xs in zip(self.group.matrices(out), self.group.matrices(x), strict=True):
            torch.mul(xs, part.sum(1, keepdim=True), out=part)

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp every number."""
        return {"U": state["U"].clamp(*bounds)}

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the number itself, twice."""
        return state["U"], state["U"]


class DiagKfac(Structure):
    """Diagonal Kronecker factors: (U X)_ij = b_i X_ij a_j."""

    trainable = ("A", "B")
    linear = False

    def identity(self, device: torch.device) -> State:
        """Return factors of ones."""
        m, n = _matrix(self.group)
        return {"A": self._ones(n, device=device), "B": self._ones(m, device=device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return b_i X_ij a_j."""
        return state["B"][:, :, None] * x * state["A"][:, None, :]

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return dA_j = sum_i b_i X_ij R_ij and dB_i = sum_j X_ij R_ij a_j."""
        xr = x * r
        dA = torch.bmm(state["B"][:, None, :], xr)[:, 0]
        dB = torch.bmm(state["A"][:, None, :], xr.mT)[:, 0]  # faster than a batch of GEMVs
        return {"A": dA, "B": dB}

    def project(self, state: State, bounds: Bounds) -> State:
        """Clamp both factors to the square roots of the bounds."""
        low, high = bounds[0] ** 0.5, bounds[1] ** 0.5
        return {k: v.clamp(low, high) for k, v in state.items()}

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme products of the factors' entries."""
        a, b = state["A"].aminmax(dim=1), state["B"].aminmax(dim=1)
        return _kronecker_extremes((a.min, a.max), (b.min, b.max))


class Kfac(Structure):
    """Full Kronecker factors: U X = B X A'."""

    trainable = ("A", "B")
    linear = False

    def identity(self, device: torch.device) -> State:
        """Return identity factors."""
        m, n = _matrix(self.group)
        return {"A": self._eyes(n, device), "B": self._eyes(m, device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return B X A'; from B - I and A - I where these are given (see :meth:`lowered`)."""
        if "A - I" not in state:
            return state["B"] @ x @ state["A"].mT
        db, da = state["B - I"], state["A - I"]
        bx = x + (db @ x.to(db.dtype)).to(x.dtype)
        return bx + (bx.to(da.dtype) @ da.mT).to(x.dtype)

    def lowered(self, state: State) -> State:
        """Return B - I and A - I in bfloat16: the identity, most of U, is not rounded."""
        eyes = {k: torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) for k, v in state.items()}
        return {f"{k} - I": (v - eyes[k]).to(torch.bfloat16) for k, v in state.items()}

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return dA = R'BX and dB = R A X'."""
        return {"A": r.mT @ (state["B"] @ x), "B": r @ (state["A"] @ x.mT)}

    def project(self, state: State, bounds: Bounds) -> State:
        """Symmetrise both factors and clip their eigenvalues to the roots of the bounds."""
        low, high = bounds[0] ** 0.5, bounds[1] ** 0.5
        return {k: clip_eigenvalues(v, low, high) for k, v in state.items()}

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme products of the (symmetrised) factors' eigenvalues."""
        a, b = (extreme_eigenvalues(state[k], exact) for k in "AB")
        return _kronecker_extremes(a, b)


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
        m, n = _matrix(self.group)
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


class Dense(Structure):
    """A full matrix on the block's flat vector: U x."""

    trainable = ("U",)

    def identity(self, device: torch.device) -> State:
        """Return identity matrices."""
        assert self.group.shape is not None
        return {"U": self._eyes(self.group.shape[0], device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x."""
        return torch.bmm(state["U"], x[:, :, None])[:, :, 0]

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return r x'."""
        return {"U": r[:, :, None] * x[:, None, :]}

    def tangent(self, x: Tensor, r: Tensor, out: Tensor) -> None:
        """Write |x|^2 r."""
        torch.mul(r, x.square().sum(1, keepdim=True), out=out)

    def project(self, state: State, bounds: Bounds) -> State:
        """Symmetrise and clip the eigenvalues."""
        return {"U": clip_eigenvalues(state["U"], *bounds)}

    def extremes(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme eigenvalues of the symmetric part."""
        return extreme_eigenvalues(state["U"], exact)


def make_structure(group: Group, *, learned: bool, square: bool) -> Structure:
    """Return the functions of a group's structure."""
    if group.structure == "e-kfac":
        return EKfac(group, learned=learned, square=square)
    plain = {
        "identity": Structure,
        "scalar": Scalar,
        "diagonal": Diagonal,
        "vector": Diagonal,
        "diag-kfac": DiagKfac,
        "kfac": Kfac,
        "dense": Dense,
    }
    return plain[group.structure](group)


def _matrix(group: Group) -> tuple[int, int]:
    assert group.shape is not None and len(group.shape) == 2
    return group.shape[0], group.shape[1]


def _turns(old: State, new: State) -> tuple[Tensor, Tensor]:
    """Return what takes S to the diagonal of the old operator in orthogonal new bases.

    With it the new operator is the nearest to the old one that these bases allow.
    """
    turn_b, turn_a = (torch.square(new[k].mT @ old[k]) for k in ("QB", "QA"))
    return turn_b, turn_a


def _kronecker_extremes(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the extreme products of two intervals of eigenvalues."""
    products = torch.stack([x * y for x in a for y in b])
    return products.amin(0), products.amax(0)
