"""Whether a structure is what it says: checked on small blocks, against matrices and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Block, Group, Slice
from ._base import State, Structure

__all__ = ["verify_structure"]

BOUNDS = (0.5, 2.0)
#: Norm that the gradients of the check are clipped to; they are longer.
CLIP = 0.1


def verify_structure(kind: type[Structure]) -> None:
    """Check a structure on small blocks in float64; raise if it is not what it says.

    U must be the identity at :meth:`Structure.identity`, symmetric after
    :meth:`Structure.project`, with eigenvalues within the bounds and as
    :meth:`Structure.extreme_eigenvalues` tells; :meth:`Structure.pullback` must agree with
    autograd; a structure that says ``rotates`` must keep lengths in :meth:`Structure.rotate` after
    :meth:`Structure.with_orthogonal_bases`, and undo it; one that says ``linear`` must be it, with
    a kernel product that is ``act_rotated(pull_rotated(x, r), x)``; the inner step must compute the
    same as the plain functions. A structure that is wrong in one of these would learn a wrong U
    without a sign.

    Args:
        kind: the class.

    Raises:
        ValueError: which of these does not hold, of which structure.
    """
    for trait in ("name", "trainable", "cut"):
        if not hasattr(kind, trait):
            raise ValueError(f"structure: {kind.__name__} does not say its {trait!r}")
    if kind.elementwise and kind.cut != "layer":
        raise ValueError(f"structure: {kind.__name__} is elementwise, so its cut must be 'layer'")
    _Verification(kind).run_all()


class _Verification:
    """The checks of one structure, on two equal blocks with a random state."""

    def __init__(self, kind: type[Structure]) -> None:
        shape = {"layer": None, "runs": (6,), "rectangles": (3, 4)}[kind.cut]
        numel = 12 if shape is None else int(torch.Size(shape).numel())
        blocks = [Block("", (Slice(str(i), None, (0, numel)),), index=i) for i in range(2)]
        group = Group(kind, shape, torch.float64, blocks)
        self.kind, self.part, self.size = kind, kind(group), numel
        self.noise = torch.Generator("cpu").manual_seed(0)
        device = torch.device("cpu")
        self.identity = self.part.identity(device)
        self.x, self.r = (group.shape_blocks(self._draw(2 * numel)) for _ in range(2))
        self.state = self._random_state()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.noise, dtype=torch.float64, device="cpu")

    def _random_state(self) -> State:
        """Return a positive definite state away from the identity."""
        begin = self.part.renew_bases(self.identity, self.x, True, True)
        # Far enough that the bounds are met on both sides.
        moved = {k: begin[k] + 1.5 * self._draw(*begin[k].shape) for k in self.kind.trainable}
        return self.part.project({**begin, **moved}, BOUNDS)

    def require(self, holds: bool, what: str) -> None:
        """Raise unless something holds."""
        if not holds:
            raise ValueError(f"structure: {self.kind.__name__} ({self.kind.name!r}) {what}")

    def run_all(self) -> None:
        """Make every check."""
        apply, x = self.part.apply, self.x
        unchanged = torch.allclose(apply(self.identity, x), x, rtol=1e-12, atol=1e-12)
        self.require(unchanged, "is not U = I at identity()")
        self.require(
            set(self.kind.trainable) <= set(self.identity),
            f"has trainable entries {self.kind.trainable} that identity() lacks",
        )
        with torch.no_grad():
            self._check_views()
            self._check_matrices()
            self._check_pullback()
            self._check_inner_step()
            if self.kind.rotates:
                self._check_rotation()
            if self.kind.linear and self.kind.trainable:
                self._check_linear()
            if self.kind.elementwise:
                self._check_scaling()

    def _check_views(self) -> None:
        """Blocks must be views of the state that cover it once."""
        total = sum(v.numel() for v in self.state.values())
        blocks = self.part.states_of_blocks(self.state)
        views = self.part.split_by_block(self.state)
        covered = len(blocks) == 2 and sum(v.numel() for v in views) == total
        covered &= [sum(v.numel() for v in b.values()) for b in blocks] == [total // 2] * 2
        self.require(covered, "has states_of_blocks() or split_by_block() that miss entries")

    def _check_matrices(self) -> None:
        """Compare with explicit matrices."""
        matrices = []
        # Column i of block b is U applied to the i-th unit vector of that block only.
        for b in range(2):
            columns = []
            for i in range(self.size):
                unit = torch.zeros(2, self.size, dtype=torch.float64, device="cpu")
                unit[b, i] = 1
                image = self.part.apply(self.state, unit.view(self.x.shape)).view(2, self.size)
                self.require(not bool(image[1 - b].any()), "mixes blocks in apply()")
                columns.append(image[b])
            matrices.append(torch.stack(columns, 1))
        u = torch.stack(matrices)
        self.require(torch.allclose(u, u.mT, atol=1e-9), "is not symmetric after project()")
        values = torch.linalg.eigvalsh(u)
        low, high = float(values.min()), float(values.max())
        inside = BOUNDS[0] - 1e-6 <= low and high <= BOUNDS[1] + 1e-6
        self.require(inside, f"has eigenvalues {low:.3g} .. {high:.3g} after project{BOUNDS}")
        told = torch.stack(self.part.extreme_eigenvalues(self.state, True), 1).double()
        right = torch.allclose(told, values[:, [0, -1]], rtol=1e-6, atol=1e-6)
        self.require(right, "tells other extreme_eigenvalues() than its matrices have")

    def _check_pullback(self) -> None:
        found = self.part.pullback(self.state, self.x, self.r)
        # The base class differentiates apply() by autograd.
        sure = Structure.pullback(self.part, self.state, self.x, self.r)
        self._require_equal(found, sure, "has a pullback() that is not the gradient of <r, U x>")

    def _check_inner_step(self) -> None:
        """Two steps must move the state as the plain functions do."""
        begin = self.state
        step = self.part.inner_step(begin, self.x)
        state = {k: v.clone() for k, v in begin.items()}
        momenta: dict[str, Tensor] = {}
        out = torch.empty_like(self.x)
        for _ in range(2):
            step.write_control(out)
            u = self.part.apply(state, self.x)
            same = torch.allclose(out, u, rtol=1e-9, atol=1e-9)
            self.require(same, "has an inner_step() that computes another U x")
            gradient = self.part.pullback(state, self.x, self.r)
            for value in self.part.split_by_block(gradient):
                value.mul_(CLIP / value.norm().clamp(min=CLIP))
            for key, value in gradient.items():
                momenta[key] = 0.9 * momenta.get(key, torch.zeros_like(value)) + value
                state[key] = state[key] - 0.01 * momenta[key]
            step.take_step(self.r, 0.01, 0.9, CLIP)
        self._require_equal(step.final_state(), state, "has an inner_step() that moves elsewhere")

    def _check_rotation(self) -> None:
        """Rotations must keep lengths and be undone, whatever a solve did to the state."""
        part, x = self.part, self.x
        trained = {k: self.state[k] for k in self.kind.trainable}
        moved = {k: v + 0.2 * self._draw(*v.shape) for k, v in trained.items()}
        state = part.with_orthogonal_bases({**self.state, **moved})
        turned = part.rotate(state, x)
        same = torch.allclose(turned.norm(), x.norm(), rtol=1e-9)
        same &= torch.allclose(part.rotate_back(state, turned), x, rtol=1e-9, atol=1e-9)
        self.require(same, "has a rotate() that is no rotation, or is not undone by rotate_back()")

    def _check_linear(self) -> None:
        """U must be linear in the trainable entries, in rotated coordinates."""
        part, state = self.part, self.state
        x, r = part.rotate(state, self.x), part.rotate(state, self.r)
        # U[s + 2 t] x = U[s] x + 2 U[t] x
        other = {k: self._draw(*state[k].shape) for k in self.kind.trainable}
        both = {k: state[k] + 2 * v for k, v in other.items()}
        apart = part.act_rotated(state, x) + 2 * part.act_rotated({**state, **other}, x)
        linear = torch.allclose(part.act_rotated({**state, **both}, x), apart, atol=1e-9)
        self.require(linear, "says linear = True, but U is not linear in its trainable entries")
        back = part.rotate_back(state, part.act_rotated(state, x))
        self.require(
            torch.allclose(back, part.apply(state, self.x), atol=1e-9),
            "has rotate(), act_rotated() and rotate_back() that are not apply()",
        )
        pulled = part.pull_rotated(x, r)
        self._require_equal(
            pulled, part.pullback(state, self.x, self.r), "has a pull_rotated() unlike pullback()"
        )
        out = torch.empty_like(x)
        part.kernel_product(x, r, out)
        sure = part.act_rotated({**state, **pulled}, x)
        good = torch.allclose(out, sure, atol=1e-9)
        self.require(good, "has a kernel_product() that is not act_rotated(pull_rotated(x, r), x)")

    def _check_scaling(self) -> None:
        """Tensors of some parameters must be scaled as their entries of the flat vector are."""
        first = self.x.view(2, self.size)[0]
        scaled, absent = self.part.scale_tensors(self.state, [first, None])
        whole = self.part.apply(self.state, self.x).view(2, self.size)[0]
        good = absent is None and scaled is not None and torch.allclose(scaled, whole)
        self.require(good, "has a scale_tensors() that is not apply()")

    def _require_equal(self, found: State, sure: State, what: str) -> None:
        equal = found.keys() == sure.keys() and all(
            torch.allclose(found[k], v, rtol=1e-8, atol=1e-9) for k, v in sure.items()
        )
        self.require(equal, what)
