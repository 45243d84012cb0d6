"""Full Kronecker factors: U X = B X A'."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from ..layout._blocks import CutRule
from ._application import Application, compress_factors, multiply_left, multiply_right
from ._base import Bounds, State, Structure
from ._eigenvalues import clip_eigenvalues, extremes_of_kronecker, extremes_of_matrices
from ._inner_step import InnerStep
from ._low_rank import span_of_columns

__all__ = ["Kfac"]


class Kfac(Structure):
    """Full Kronecker factors: U X = B X A'."""

    name: ClassVar[str] = "kfac"
    cut: ClassVar[CutRule] = "rectangles"
    trainable: ClassVar[tuple[str, ...]] = ("A", "B")

    def identity(self, device: torch.device) -> State:
        """Return identity factors."""
        m, n = self.group.matrix_shape
        return {"A": self.batch_of_identities(n, device), "B": self.batch_of_identities(m, device)}

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return B X A', (m, m) @ (m, n) @ (n, n); see :meth:`applied_form` for other forms."""
        if "A - I" not in state:
            moved = multiply_right(state, "A", multiply_left(state, "B", x), transposed=True)
            return x.clone() if moved is x else moved  # two factors I of no rank do nothing
        db, da = state["B - I"], state["A - I"]
        # B X A' = (I + dB) X (I + dA)': what is rounded is small beside X.
        bx = x + (db @ x.to(db.dtype)).to(x.dtype)
        return bx + (bx.to(da.dtype) @ da.mT).to(x.dtype)

    def applied_form(self, state: State, application: Application) -> State:
        """Return the factors as I + L R', or B - I and A - I in bfloat16."""
        if application == "full":
            return state
        if application == "low-rank":
            entries = self.count * math.prod(self.group.matrix_shape)
            return compress_factors(state, {"A": 2, "B": 2}, entries, symmetric=True)
        # The identity, most of U, is not rounded.
        eyes = {k: torch.eye(v.shape[-1], dtype=v.dtype, device=v.device) for k, v in state.items()}
        return {f"{k} - I": (v - eyes[k]).to(torch.bfloat16) for k, v in state.items()}

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return dA = R'BX and dB = R A X'."""
        return {"A": r.mT @ (state["B"] @ x), "B": r @ (state["A"] @ x.mT)}

    def project(self, state: State, bounds: Bounds) -> State:
        """Symmetrise both factors and clip their eigenvalues to the roots of the bounds."""
        # The eigenvalues of A (x) B are products of those of A and B.
        low, high = bounds[0] ** 0.5, bounds[1] ** 0.5
        return {k: clip_eigenvalues(v, low, high) for k, v in state.items()}

    def extreme_eigenvalues(self, state: State, exact: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme products of the (symmetrised) factors' eigenvalues."""
        a, b = (extremes_of_matrices(state[k], exact) for k in "AB")
        return extremes_of_kronecker(a, b)

    def inner_step(self, state: State, x: Tensor) -> InnerStep:
        """Return the steps that stay in the span of X and never form the wide factor."""
        return KfacStep(self, state, x)


class KfacStep(InnerStep):
    r"""U X = B X A' on the span of X, with the factor of the wider side kept as what changed it.

    For m <= n let X = P Y with orthonormal columns P (m x k, k the rank of X). Only B P acts on X,
    every gradient of A is dA = R'B X = (R'BP) Y, and every one of B is dB = R A X' = (R A Y') P'.
    So V = B P (m x k) and A = A_0 + Z Y (Z is n x k) are all that moves:

        T = Y A' = Y A_0' + (Y Y') Z',    U X = V T,    dZ = R'V,    dV = R T',
        |dA|^2 = tr(dZ'dZ Y Y'),    |dB| = |dV|.

    6 m n k + 2 n k^2 operations per step in place of 6 m^2 n + 4 m n^2, and momenta on k columns;
    the factors are formed once, at the end. A gradient of full rank is P = I, Y = X. A tall X is
    the transposed case: U X = (A X' B')', with A and B changing places.
    """

    def copy_entries(self) -> State:
        """Return Z = 0 for the wide factor and V = B_0 P for the narrow one."""
        tall = self.x.shape[1] > self.x.shape[2]
        self.wide, self.narrow = ("B", "A") if tall else ("A", "B")
        self.tall = tall
        x = self.x.mT if tall else self.x
        b, _, n = x.shape
        self.span = span = span_of_columns(x)
        self.y = x if span is None else torch.bmm(span.mT, x)
        self.fixed = torch.bmm(self.y, self.begin[self.wide].mT)  # Y A_0'
        self.square = torch.bmm(self.y, self.y.mT)  # Y Y'
        self.length = torch.linalg.matrix_norm(self.square).sqrt()  # at least Y's spectral norm
        narrow = self.begin[self.narrow]
        v = narrow.clone() if span is None else torch.bmm(narrow, span)
        return {"Z": x.new_zeros(b, n, self.y.shape[1]), "V": v}

    def final_state(self) -> State:
        """Return the factors: A_0 + Z Y, and B_0 + (V - B_0 P) P'."""
        wide = torch.baddbmm(self.begin[self.wide], self.entries["Z"], self.y)
        narrow, b0 = self.entries["V"], self.begin[self.narrow]
        if self.span is not None:
            moved = narrow - torch.bmm(b0, self.span)
            narrow = torch.baddbmm(b0, moved, self.span.mT)
        return {**self.begin, self.wide: wide, self.narrow: narrow}

    def compute_control(self, out: Tensor) -> None:
        """Write V T."""
        t = self.reuse_buffer("t", *self.fixed.shape)
        torch.baddbmm(self.fixed, self.square, self.entries["Z"].mT, out=t)
        if self.tall:
            torch.bmm(t.mT, self.entries["V"].mT, out=out)
        else:
            torch.bmm(self.entries["V"], t, out=out)

    def compute_gradient(self, r: Tensor) -> State:
        """Return dZ = R'V and dV = R T'."""
        r = r.mT if self.tall else r
        z, v = self.entries["Z"], self.entries["V"]
        dz = torch.bmm(r.mT, v, out=self.reuse_buffer("dz", *z.shape))
        dv = torch.bmm(r, self.buffers["t"].mT, out=self.reuse_buffer("dv", *v.shape))
        return {"Z": dz, "V": dv}

    def gradient_norms(self, key: str, rows: Tensor, clip: float) -> Tensor:
        """Return the norms, for Z those of dA = dZ Y (zero if all are below the clip)."""
        plain = super().gradient_norms(key, rows, clip)
        if key != "Z":
            return plain
        # |dZ Y| <= |dZ| |Y|: mostly nothing is clipped, and no product is needed to know it.
        if not bool((plain * self.length > clip).any()):
            return torch.zeros_like(plain)
        z = rows.view_as(self.entries["Z"])
        image = torch.bmm(z, self.square, out=self.reuse_buffer("image", *z.shape))
        return image.mul_(z).sum((1, 2)).clamp_(min=0).sqrt_()
