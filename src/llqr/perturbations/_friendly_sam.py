"""FriendlySAM (F-SAM): probe along the part of the gradient that is new, through U."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import Schedule, check_number
from .._vectors import Tensors, former_names
from ._base import Probe
from ._sam import SAM, Direction, Norm

__all__ = ["FriendlySAM"]


class FriendlySAM(SAM):
    r"""Probe along the part of the gradient that is new, through U.

    .. math:: v = g - \sigma m, \qquad \epsilon = \rho \frac{U v}{\sqrt{v^\top U v}}, \qquad
              m \leftarrow \lambda m + (1 - \lambda) g \text{ after } v

    The memory m starts at zero, as in the paper's code (the method's own authors start at g). It
    holds raw gradients, advances also at rho = 0, and does not advance at a skipped step. The
    paper takes lambda = .6, .9 or .95 (appendix C).

    Args:
        rho: radius (see :class:`Perturbation`).
        sigma: how much of the memory is subtracted.
        decay: lambda, in [0, 1).
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        start: first optimizer step that is probed.

    Source: T. Li et al., Friendly sharpness-aware minimization, CVPR 2024.

    Example:
        >>> import llqr
        >>> llqr.FriendlySAM(rho=0.1).decay
        0.9
    """

    def __init__(
        self,
        rho: Schedule = 0.1,
        *,
        sigma: float = 1.0,
        decay: float = 0.9,
        norm: Norm = "metric",
        direction: Direction = "raw",
        start: int = 0,
    ) -> None:
        super().__init__(rho, norm=norm, direction=direction, start=start)
        check_number("sigma", sigma, low=0)
        check_number("decay", decay, low=0, high=1)
        self.sigma, self.decay = sigma, decay
        self._parameters: Tensors = {}
        self._memory: dict[str, Tensor] = {}
        self._next_memory: dict[str, Tensor] = {}

    def bind(self, parameters: Tensors) -> None:
        """Start the memory at zero; refuse the parameters of another model."""
        for name, p in parameters.items():
            if self._parameters.get(name, p) is not p:
                raise ValueError(
                    f"perturbation: this FriendlySAM remembers gradients of another {name!r}; make "
                    "a new one for this model"
                )
        self.rebind(parameters)

    def rebind(self, parameters: Tensors) -> None:
        """Keep the memory of tensors that were there before; new ones start at zero."""
        before = former_names(self._parameters, parameters)
        memory, coming = self._memory, self._next_memory
        self._memory, self._next_memory = {}, {}
        for name, p in parameters.items():
            old = before.get(name, "")
            if old in memory and memory[old].shape == p.shape:
                self._memory[name] = memory[old]
                if old in coming:
                    self._next_memory[name] = coming[old]
            else:
                self._memory[name] = _zero_memory(p)
        self._parameters = parameters

    def displacement(self, probe: Probe) -> dict[str, Tensor] | None:
        """Return SAM's displacement with v = g - sigma m in the place of g."""
        v = {n: g - self.sigma * self._recall_memory(n, g) for n, g in probe.gradients.items()}
        return self._ascend(v, probe)

    def _recall_memory(self, name: str, like: Tensor) -> Tensor:
        memory = self._memory[name]
        if memory.is_meta or memory.shape != like.shape:  # filled, or cut in place, since
            memory = self._memory[name] = torch.zeros_like(like)
        elif (memory.device, memory.dtype) != (like.device, like.dtype):  # the model was moved
            memory = self._memory[name] = memory.to(like)
        return memory

    def observe(self, gradients: Tensors) -> None:
        """Form the next memory; it becomes the memory when the step counts."""
        keep = self.decay
        self._next_memory = {
            n: keep * self._recall_memory(n, g) + (1 - keep) * g for n, g in gradients.items()
        }

    def commit(self) -> None:
        """Take over the next memory."""
        self._memory.update(self._next_memory)
        self._next_memory = {}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the memory."""
        return {name: {"memory": m} for name, m in self._memory.items()}

    def reset(self) -> None:
        """Set the memory to zero."""
        self._memory = {name: torch.zeros_like(m) for name, m in self._memory.items()}
        self._next_memory = {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a memory; a frozen parameter's may be missing and stays as it is."""
        new = {}
        for name, memory in self._memory.items():
            value = state.get(name, {}).get("memory")
            if value is None and not self._parameters[name].requires_grad:
                value = memory
            if value is None or value.shape != memory.shape:
                raise ValueError(
                    f"state: no FriendlySAM memory of shape {tuple(memory.shape)} for {name!r}"
                )
            new[name] = value.detach().to(memory).clone()
        self._memory, self._next_memory = new, {}


def _zero_memory(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
