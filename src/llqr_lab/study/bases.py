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
#: Of Adam's relatives, decoupled; of SGD, in the gradient.
ADAM_DECAY, SGD_DECAY = 0.01, 5e-4


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base optimizer, as the study runs it.

    Attributes:
        make: (network, learning rate) -> one optimizer or several for parts of the network.
        family: whose learning rates it takes; a problem has a usual one for each family.
        factor: its usual learning rate over that of the family.
        package: that it comes from, beside torch.
        new_in_torch: its name in torch.optim, if the oldest supported torch lacks it.
        own_schedule: whether it needs no falling learning rate and averages by itself.
    """

    make: Callable[[nn.Module, float], list[Optimizer]]
    family: Family
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


def sgdm(network: nn.Module, lr: float) -> list[Optimizer]:
    """SGD with momentum."""
    decay = SGD_DECAY
    return [torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=decay)]


def adamw(network: nn.Module, lr: float) -> list[Optimizer]:
    """AdamW (I. Loshchilov and F. Hutter, ICLR 2019)."""
    return [torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=ADAM_DECAY)]


def muon(network: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the matrices, AdamW for all else (K. Jordan, 2024), at one learning rate.

    torch's Muon takes matrices only, so convolutions are AdamW's; its updates have the length of
    AdamW's (J. Liu et al., Muon is scalable for LLM training, 2025).
    """
    matrices = [p for p in network.parameters() if p.dim() == 2]
    rest = [p for p in network.parameters() if p.dim() != 2]
    first = torch.optim.Muon(
        matrices, lr=lr, weight_decay=ADAM_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    return [first, torch.optim.AdamW(rest, lr=lr, weight_decay=ADAM_DECAY)]


def soap(network: nn.Module, lr: float) -> list[Optimizer]:
    """SOAP (N. Vyas et al., ICLR 2025), by pytorch_optimizer."""
    from pytorch_optimizer import SOAP

    return [SOAP(network.parameters(), lr=lr, weight_decay=ADAM_DECAY, precondition_frequency=10)]


def shampoo(network: nn.Module, lr: float) -> list[Optimizer]:
    """Shampoo as in its first paper (V. Gupta et al., ICML 2018), by pytorch_optimizer."""
    from pytorch_optimizer import Shampoo

    return [Shampoo(network.parameters(), lr=lr, preconditioning_compute_steps=10)]


def schedule_free(network: nn.Module, lr: float) -> list[Optimizer]:
    """Schedule-free AdamW (A. Defazio et al., NeurIPS 2024), by its authors."""
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(network.parameters(), lr=lr, weight_decay=ADAM_DECAY)]


BASES = {
    "SGDM": Base(make=sgdm, family="sgd"),
    "AdamW": Base(make=adamw, family="adam"),
    "Muon": Base(make=muon, family="adam", new_in_torch="Muon"),
    "SOAP": Base(make=soap, family="adam", package="pytorch_optimizer"),
    # Between the roots, directions that no gradient had before are hardly damped.
    "Shampoo": Base(make=shampoo, family="sgd", factor=0.3, package="pytorch_optimizer"),
    "schedule-free AdamW": Base(
        make=schedule_free, family="adam", package="schedulefree", own_schedule=True
    ),
}
