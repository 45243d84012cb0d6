"""The base optimizers of the study: torch's, and those that people use from their own packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["BASES", "Base", "shampoo", "soap"]

Family = Literal["sgd", "adam"]


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base optimizer, as the study runs it.

    Attributes:
        make: (network, learning rate, weight decay) -> one optimizer or several for parts of the
            network. Adam's relatives decay weights, SGD adds the decay to the gradient.
        family: whose learning rates it takes; a problem has a usual one for each family.
        decay: its usual weight decay.
        factor: its usual learning rate over that of the family.
        package: that it comes from, beside torch.
        new_in_torch: its name in torch.optim, if the oldest supported torch lacks it.
        own_schedule: whether it needs no falling learning rate and averages by itself.
    """

    make: Callable[[nn.Module, float, float], list[Optimizer]]
    family: Family
    decay: float
    factor: float = 1.0
    package: str | None = None
    new_in_torch: str | None = None
    own_schedule: bool = False

    @property
    def missing(self) -> str | None:
        """What must be installed to run it; None if nothing must."""
        if self.new_in_torch is not None and not hasattr(torch.optim, self.new_in_torch):
            return f"a torch that has torch.optim.{self.new_in_torch}"
        if self.package is not None and find_spec(self.package) is None:
            return "pip install 'llqr[peers]'"
        return None


def sgdm(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """SGD with momentum."""
    return [torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=decay)]


def adamw(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """AdamW (I. Loshchilov and F. Hutter, ICLR 2019)."""
    return [torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=decay)]


def muon(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """Muon for the matrices, AdamW for all else (K. Jordan, 2024), at one learning rate.

    torch's Muon takes matrices only, so convolutions are AdamW's; its updates have the length of
    AdamW's (J. Liu et al., Muon is scalable for LLM training, 2025).
    """
    matrices = [p for p in network.parameters() if p.dim() == 2]
    rest = [p for p in network.parameters() if p.dim() != 2]
    first = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [first, torch.optim.AdamW(rest, lr=lr, weight_decay=decay)]


def soap(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """SOAP (N. Vyas et al., ICLR 2025), by pytorch_optimizer."""
    from pytorch_optimizer import SOAP

    return [SOAP(network.parameters(), lr=lr, weight_decay=decay, precondition_frequency=10)]


def shampoo(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """Shampoo as in its first paper (V. Gupta et al., ICML 2018), by pytorch_optimizer."""
    from pytorch_optimizer import Shampoo

    rarely = {"preconditioning_compute_steps": 10}
    return [Shampoo(network.parameters(), lr=lr, weight_decay=decay, **rarely)]


def schedule_free(network: nn.Module, lr: float, decay: float) -> list[Optimizer]:
    """Schedule-free AdamW (A. Defazio et al., NeurIPS 2024), by its authors."""
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(network.parameters(), lr=lr, weight_decay=decay)]


BASES = {
    "SGDM": Base(make=sgdm, family="sgd", decay=5e-4),
    "AdamW": Base(make=adamw, family="adam", decay=0.01),
    "Muon": Base(make=muon, family="adam", decay=0.01, new_in_torch="Muon"),
    "SOAP": Base(make=soap, family="adam", decay=0.01, package="pytorch_optimizer"),
    # Between the roots, directions that no gradient had before are hardly damped.
    "Shampoo": Base(make=shampoo, family="sgd", decay=0.0, factor=0.3, package="pytorch_optimizer"),
    "schedule-free AdamW": Base(
        make=schedule_free, family="adam", decay=0.01, package="schedulefree", own_schedule=True
    ),
}
