"""The steps of an inner solve on one group of blocks, with buffers kept between them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["InnerStep", "State"]

State = dict[str, Tensor]


class Steppable(Protocol):
    """What the steps need of a structure."""

    @property
    def trainable(self) -> tuple[str, ...]:
        """The entries that move."""
        ...

    def apply(self, state: State, x: Tensor) -> Tensor:
        """Return U x."""
        ...

    def pullback(self, state: State, x: Tensor, r: Tensor) -> State:
        """Return the gradient of <r, U x>."""
        ...

    def rows_per_block(self, entry: Tensor) -> list[Tensor]:
        """Return matrices with one row per block."""
        ...


class InnerStep:
    """U x, then a step along the pullback of r: the general form, and the base of faster ones.

    The same steps as the literal loop with momentum. Between the value and the gradient of one
    step nothing is computed twice, results go to buffers made once (fresh memory costs more than
    the arithmetic of a small block), and equal blocks are one batch.

    Args:
        structure: whose functions are used.
        state: where the solve starts; not changed.
        x: the gradient, as the structure's group views it.
    """

    def __init__(self, structure: Any, state: State, x: Tensor) -> None:
        self.structure: Steppable = structure
        self.x, self.begin = x, state
        self.buffers: dict[str, Tensor] = {}
        self.entries = self.copy_entries()
        self.momenta = {k: torch.zeros_like(v) for k, v in self.entries.items()}

    # -- what a faster form overrides ----------------------------------------------------------

    def copy_entries(self) -> State:
        """Return copies of what moves."""
        return {k: self.begin[k].clone() for k in self.structure.trainable}

    def final_state(self) -> State:
        """Return the state that was reached."""
        return {**self.begin, **self.entries}

    def compute_control(self, out: Tensor) -> None:
        """Write U x."""
        out.copy_(self.structure.apply({**self.begin, **self.entries}, self.x))

    def compute_gradient(self, r: Tensor) -> State:
        """Return the pullback of r, at the state of the last :meth:`compute_control`."""
        return self.structure.pullback({**self.begin, **self.entries}, self.x, r)

    def gradient_norms(self, key: str, rows: Tensor, clip: float) -> Tensor:
        """Return the norm of each block's gradient, from one row per block.

        Norms below ``clip`` need not be exact.
        """
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms

    # -- what the solve calls ------------------------------------------------------------------

    def write_control(self, out: Tensor) -> None:
        """Write U x, in whatever precision ``out`` has."""
        if out.dtype == self.x.dtype:
            self.compute_control(out)
        else:
            mine = self.reuse_buffer("control", *self.x.shape)
            self.compute_control(mine)
            out.copy_(mine)

    def take_step(self, r: Tensor, lr: float, momentum: float, clip: float | None) -> None:
        """Move the entries along the momentum of the clipped gradients."""
        # v <- momentum v + clip(g), s <- s - lr v
        for key, gradient in self.compute_gradient(r).items():
            if clip is not None:
                self._clip_blocks(key, gradient, clip)
            self.momenta[key].mul_(momentum).add_(gradient)
            self.entries[key].sub_(self.momenta[key], alpha=lr)

    def _clip_blocks(self, key: str, gradient: Tensor, clip: float) -> None:
        """Scale the gradient of each block to norm at most c, in place: g c / max(c, |g|)."""
        for rows in self.structure.rows_per_block(gradient):
            norms = self.gradient_norms(key, rows, clip)
            rows.mul_((clip / norms.clamp(min=clip))[:, None])

    def reuse_buffer(self, name: str, *shape: int) -> Tensor:
        """Return the same memory for the same name."""
        if name not in self.buffers:
            self.buffers[name] = self.x.new_empty(shape)
        return self.buffers[name]
