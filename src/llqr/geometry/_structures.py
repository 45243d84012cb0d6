"""The structures of U, and which one a group has.

:class:`llqr.geometry._structure.Structure` says what each function is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ekfac import EKfac
from ._pieces import Group
from ._spectra import clip_eigenvalues, extreme_eigenvalues
from ._structure import Bounds, State, Structure, matrix_of

__all__ = ["Dense", "DiagKfac", "Diagonal", "Kfac", "Scalar", "make_structure"]


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
        m, n = matrix_of(self.group)
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
        m, n = matrix_of(self.group)
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


def _kronecker_extremes(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the extreme products of two intervals of eigenvalues."""
    products = torch.stack([x * y for x in a for y in b])
    return products.amin(0), products.amax(0)
