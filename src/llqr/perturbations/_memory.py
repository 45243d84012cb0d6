"""SAM with a memory: one tensor per parameter that follows it and is part of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import Schedule
from .._vectors import Tensors, former_names
from ._sam import SAM, Along, Direction, Norm

__all__ = ["RememberingSAM"]


class RememberingSAM(SAM):
    """Keep a tensor for each parameter, at first zero (base class).

    A subclass reads it with :meth:`_recall` and puts what it becomes in ``_next_memory``; that is
    taken over when the step counts.
    """

    #: Under which key a checkpoint has it.
    memory_key: ClassVar[str] = "memory"

    def __init__(
        self,
        rho: Schedule,
        *,
        norm: Norm,
        direction: Direction,
        along: Along,
        start: int,
        interval: int,
    ) -> None:
        super().__init__(
            rho, norm=norm, direction=direction, along=along, start=start, interval=interval
        )
        self._parameters: Tensors = {}
        self._memory: dict[str, Tensor] = {}
        self._next_memory: dict[str, Tensor] = {}

    def bind(self, parameters: Tensors) -> None:
        """Start the memory at zero; refuse the parameters of another model."""
        for name, p in parameters.items():
            if self._parameters.get(name, p) is not p:
                kind = type(self).__name__
                raise ValueError(
                    f"perturbation: this {kind} remembers gradients of another {name!r}; make "
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

    def _recall(self, name: str, like: Tensor) -> Tensor:
        """Return the memory of a parameter, where and as its gradient is."""
        memory = self._memory[name]
        if memory.is_meta or memory.shape != like.shape:  # filled, or cut in place, since
            memory = self._memory[name] = torch.zeros_like(like)
        elif (memory.device, memory.dtype) != (like.device, like.dtype):  # the model was moved
            memory = self._memory[name] = memory.to(like)
        return memory

    def _recall_all(self, like: Tensors) -> list[Tensor]:
        """Return the memory of each parameter, where and as its gradient is."""
        return [self._recall(name, gradient) for name, gradient in like.items()]

    def commit(self) -> None:
        """Take over the next memory."""
        self._memory.update(self._next_memory)
        self._next_memory = {}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the memory."""
        return {name: {self.memory_key: m} for name, m in self._memory.items()}

    def reset(self) -> None:
        """Set the memory to zero."""
        self._memory = {name: torch.zeros_like(m) for name, m in self._memory.items()}
        self._next_memory = {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a memory; a frozen parameter's may be missing and stays as it is."""
        new = {}
        for name, memory in self._memory.items():
            value = state.get(name, {}).get(self.memory_key)
            if value is None and not self._parameters[name].requires_grad:
                value = memory
            if value is None or value.shape != memory.shape:
                raise ValueError(
                    f"state: no {type(self).__name__} memory of shape {tuple(memory.shape)} for "
                    f"{name!r}"
                )
            new[name] = value.detach().to(memory).clone()
        self._memory, self._next_memory = new, {}


def _zero_memory(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
