"""The one table of the study's methods: a method is a row, and a row is all that one needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

import llqr

from .bases import BASES, Base

__all__ = ["ABLATION", "METHODS", "TRANSLATING", "Method", "Range"]

MakeGeometry = Callable[[], llqr.Geometry]
MakePerturbation = Callable[[float], llqr.Perturbation]


@dataclass(frozen=True)
class Range:
    """Where a number is searched, on a logarithmic scale; the search begins at ``start``."""

    low: float
    start: float
    high: float


RADII = Range(0.01, 0.05, 0.25)
MOMENTUM_RADII = Range(0.1, 0.5, 2.5)  # the momentum is far from the steepest ascent
#: Of each family, where a problem has its weight decay searched.
DECAYS = {"sgd": Range(2e-4, 2e-3, 2e-2), "adam": Range(0.01, 0.1, 1.0)}
RATE_FACTOR = 5.0  # the learning rate is searched from a problem's usual one over this to times it


@dataclass(frozen=True, kw_only=True)
class Method:
    """A base, a geometry, a perturbation, and where the radius is searched.

    What a row looks like identifies its runs, so it has classes and partials, not lambdas.

    Attributes:
        base: a name in ``BASES``; its learning rate is always searched.
        geometry: makes the metric; None: U = I.
        perturbation: makes the probe of a radius; None: one pass.
        radii: where the radius is searched.
        options: of :class:`llqr.Optimizer`, such as graft and transport.
    """

    base: str = "SGDM"
    geometry: MakeGeometry | None = None
    perturbation: MakePerturbation | None = None
    radii: Range = RADII
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_row(self) -> Base:
        """The row of the base."""
        return BASES[self.base]

    def ranges(self, rates: Mapping[str, float], *, decay: bool = False) -> dict[str, Range]:
        """Return where each setting is searched.

        Args:
            rates: the problem's usual learning rate of each family.
            decay: whether the weight decay is searched, too.
        """
        family = self.base_row.family
        lr = rates[family] * self.base_row.factor
        found = {"lr": Range(lr / RATE_FACTOR, lr, lr * RATE_FACTOR)}
        found |= {"decay": DECAYS[family]} if decay else {}
        return found | ({} if self.perturbation is None else {"rho": self.radii})

    def optimizer(
        self, network: nn.Module, settings: Mapping[str, float]
    ) -> Optimizer | llqr.Optimizer:
        """Return the optimizer; a base by itself is run without the library."""
        decay = settings.get("decay", self.base_row.decay)
        bases = self.base_row.make(network, settings["lr"], decay)
        geometry = None if self.geometry is None else self.geometry()
        probe = None if self.perturbation is None else self.perturbation(settings["rho"])
        if geometry is None and probe is None and len(bases) == 1:
            return bases[0]
        return llqr.Optimizer(
            bases if len(bases) > 1 else bases[0],
            network,
            geometry=geometry,
            perturbation=probe,
            **self.options,
        )


GRAFT = {"graft": True}
LAYERS = {"graft": "layer"}
IN_BASES = {"base": "AdamW", "geometry": llqr.NaturalGradient, "options": {"transport": "bases"}}
OF_GRADIENTS = IN_BASES | {"geometry": llqr.GradientMoments}
ALONG_G = partial(llqr.SAM, along="gradient")
CHEAP_ALONG_G = partial(ALONG_G, interval=5)
FRIENDLY_ALONG_G = partial(llqr.FriendlySAM, along="gradient")
PAPER = llqr.LLQR.paper


def _probed(name: str, **row: Any) -> dict[str, Method]:
    """Return a metric without a probe and with all of them."""
    return {
        name: Method(**row),
        f"{name} + SAM": Method(perturbation=llqr.SAM, **row),
        f"{name} + SAM along g": Method(perturbation=ALONG_G, **row),
        f"{name} in the probe only": Method(
            perturbation=llqr.SAM, **row | {"options": {"transport": False}}
        ),
        f"{name} + F-SAM": Method(perturbation=FRIENDLY_ALONG_G, **row),
        f"{name} + SAM along g (interval=5)": Method(perturbation=CHEAP_ALONG_G, **row),
    }


def _with_cheap_probes(base: str, prefix: str) -> dict[str, Method]:
    """Return the probes of a base that cost less than SAM."""
    momentum = {"perturbation": llqr.MSAM, "radii": MOMENTUM_RADII}
    return {
        f"{prefix}SAM(interval=5)": Method(base=base, perturbation=partial(llqr.SAM, interval=5)),
        f"{prefix}LookSAM": Method(base=base, perturbation=llqr.LookSAM),
        f"{prefix}MSAM": Method(base=base, **momentum),
    }


METHODS: dict[str, Method] = {
    "SGDM": Method(),
    "SAM": Method(perturbation=llqr.SAM),
    "F-SAM": Method(perturbation=llqr.FriendlySAM),
    **_with_cheap_probes("SGDM", ""),
    "AdamW": Method(base="AdamW"),
    "AdamW + SAM": Method(base="AdamW", perturbation=llqr.SAM),
    **_with_cheap_probes("AdamW", "AdamW + "),
    "Muon": Method(base="Muon"),
    "Muon + SAM": Method(base="Muon", perturbation=llqr.SAM),
    "SOAP": Method(base="SOAP"),
    "SOAP + SAM": Method(base="SOAP", perturbation=llqr.SAM),
    "SOAP + SAM(interval=5)": Method(base="SOAP", perturbation=partial(llqr.SAM, interval=5)),
    "SOAP + LookSAM": Method(base="SOAP", perturbation=llqr.LookSAM),
    "Shampoo": Method(base="Shampoo"),
    "schedule-free AdamW": Method(base="schedule-free AdamW"),
    "LLQR (paper)": Method(geometry=PAPER),
    "LLQR (paper) + SAM": Method(geometry=PAPER, perturbation=llqr.SAM),
    **_probed("LLQR", geometry=llqr.LLQR, options=GRAFT),
    **_probed("NG", geometry=llqr.NaturalGradient, options=GRAFT),
    **_probed("NG by layer", geometry=llqr.NaturalGradient, options=LAYERS),
    **_probed("NG on AdamW", base="AdamW", geometry=llqr.NaturalGradient, options=GRAFT),
    "AdamW in GM's bases": Method(**OF_GRADIENTS),
    "AdamW in GM's bases + SAM along g": Method(perturbation=ALONG_G, **OF_GRADIENTS),
    "AdamW in GM's bases + SAM along g (interval=5)": Method(
        perturbation=CHEAP_ALONG_G, **OF_GRADIENTS
    ),
    "AdamW in U's bases": Method(**IN_BASES),
    "AdamW in U's bases + SAM along g": Method(perturbation=ALONG_G, **IN_BASES),
    "AdamW in U's bases + SAM along g (interval=5)": Method(perturbation=CHEAP_ALONG_G, **IN_BASES),
}
#: What docs/how-to-choose.md advises for small language models.
DAMPED = Method(base="AdamW", geometry=partial(llqr.NaturalGradient, damping=3.0), options=GRAFT)
TRANSLATING: dict[str, Method] = {
    **{name: METHODS[name] for name in ("AdamW", "AdamW + SAM", "SOAP", "NG on AdamW")},
    "NG on AdamW, damping 3": DAMPED,
}


def _closed(**settings: Any) -> Method:
    return Method(geometry=partial(llqr.NaturalGradient, **settings), options=GRAFT)


def _learned(**settings: Any) -> Method:
    return Method(geometry=partial(llqr.LLQR, **settings), options=GRAFT)


#: What each setting does; the names say what differs from the defaults.
ABLATION: dict[str, Method] = {
    "SGDM": METHODS["SGDM"],
    "SAM": METHODS["SAM"],
    "NG": METHODS["NG"],
    "NG, graft by layer": METHODS["NG by layer"],
    "NG, running statistics": _closed(batch_norm="running"),
    "NG, 1 sample": _closed(samples=1),
    "NG, 32 samples": _closed(samples=32),
    "NG, every 20": _closed(every=20),
    "NG, every 200": _closed(every=200),
    "NG, damping 0.003": _closed(damping=0.003),
    "NG, damping 0.3": _closed(damping=0.3),
    "NG, power 0.5": _closed(power=0.5),
    "NG, diagonal": _closed(structure="diagonal"),
    "NG, no graft": Method(geometry=llqr.NaturalGradient),
    "NG + SAM": METHODS["NG + SAM"],
    "NG + SAM along g": METHODS["NG + SAM along g"],
    "NG in the probe only": METHODS["NG in the probe only"],
    "LLQR, one gradient": _learned(structure="e-kfac"),
    "LLQR, one gradient, running statistics": _learned(structure="e-kfac", batch_norm="running"),
    "LLQR, bases of several gradients": _learned(structure="e-kfac", bases="gradient"),
    "LLQR, every 200": _learned(structure="e-kfac", every=200),
    "LLQR, damping 0.03": _learned(structure="e-kfac", damping=0.03),
    "LLQR, no graft": Method(geometry=partial(llqr.LLQR, "e-kfac")),
    "LLQR (paper)": METHODS["LLQR (paper)"],
}
