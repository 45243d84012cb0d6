"""A hyperparameter with its source, groups of them, and the methods that they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = ["Group", "METHODS", "Method", "Setting", "Some", "Source", "methods_where", "slug"]


class Source(str, Enum):
    """Where a value comes from.

    PAPER: its text, tables or captions. RECIPE: the commands and code conventions of the paper's
    authors, or a published recipe that the paper says it follows; the note says which. ASSUMED:
    neither says; chosen here. SCALE: of a run that is smaller than the paper's. TUNED: found by a
    search of this project.
    """

    PAPER = "paper"
    RECIPE = "authors' recipe"
    ASSUMED = "assumed"
    SCALE = "scale"
    TUNED = "tuned here"


@dataclass(frozen=True)
class Some:
    """Some of the methods, and what they have in common."""

    label: str
    names: Sequence[str]


@dataclass(frozen=True)
class Setting:
    """One value.

    Attributes:
        key: dotted; what follows ``llqr.``, ``probe.`` and ``base.`` is an argument of the class
            that is built.
        value: plain data.
        source: where it comes from.
        note: in what sense, or what speaks against it.
        dataset: the data sets it holds for; none: for all.
        model: the same.
        method: the methods it holds for; None: for all.
        follows: the key of a setting whose value in the run this one takes, unless it is given.
    """

    key: str
    value: Any
    source: Source
    note: str = ""
    dataset: Sequence[str] = ()
    model: Sequence[str] = ()
    method: Some | None = None
    follows: str = ""

    def holds_for(self, dataset: str, model: str, method: str) -> bool:
        """Tell whether it holds for a run."""
        methods = self.method.names if self.method else ()
        asked = ((self.dataset, dataset), (self.model, model), (methods, method))
        return all(not allowed or one in allowed for allowed, one in asked)

    def condition_text(self) -> str:
        """Say for what it holds."""
        parts = [" or ".join(self.dataset), " or ".join(self.model)]
        return ", ".join(filter(None, [*parts, self.method.label if self.method else ""]))


@dataclass(frozen=True)
class Group:
    """Settings that several experiments share."""

    title: str
    settings: Sequence[Setting]

    def __iter__(self) -> Iterator[Setting]:
        """Return the settings in their order; a later one replaces an earlier one of its key."""
        return iter(self.settings)


@dataclass(frozen=True)
class Method:
    """What a method adds to the base optimizer.

    Attributes:
        metric: the class in llqr that makes U; None: there is no U.
        curvature: of the metric, measured in refreshes; None: there is nothing to refresh.
        probe: the perturbation's class in llqr, or None.
        transport: whether U also acts on the gradient of the second pass; "bases": the base steps
            in its bases.
        base: the base's class in torch.optim, if it is part of the method; None: that of the
            experiment.
        probe_options: arguments of the perturbation that are part of the method.
    """

    metric: str | None = None
    curvature: str | None = None
    probe: str | None = None
    transport: bool | str = True
    base: str | None = None
    probe_options: Mapping[str, Any] = field(default_factory=dict)

    def own_settings(self) -> list[Setting]:
        """Return what follows from the method itself."""
        found = []
        source = Source.PAPER if self.metric == "LLQR" else Source.SCALE
        if self.curvature:
            found.append(Setting("llqr.curvature", self.curvature, source))
        if self.metric:
            found.append(Setting("optimizer.transport", self.transport, source))
        if self.probe:
            found.append(Setting("probe.kind", self.probe, source))
        for key, value in self.probe_options.items():
            found.append(Setting(f"probe.{key}", value, source))
        return found

    def uses_setting(self, key: str) -> bool:
        """Tell whether a setting means anything to the method."""
        part = key.partition(".")[0]
        read_by = {"llqr": self.metric, "refresh": self.curvature, "probe": self.probe}
        return part not in read_by or read_by[part] is not None

    def leaves_to_library(self, key: str) -> bool:
        """Tell whether no protocol speaks of a setting: the groups' values are LLQR's."""
        part, _, name = key.partition(".")
        return part == "llqr" and self.metric != "LLQR" and name != "curvature"


ALONG_G = {"along": "gradient"}
FIFTH_ALONG_G = {**ALONG_G, "interval": 5}
# The base steps in the bases of U: SOAP's way.
IN_BASES: dict[str, Any] = {"transport": "bases", "base": "AdamW"}
# NGD: the Fisher (blue in the paper's tables); Newton: the Hessian (orange).
METHODS = {
    "SGDM": Method(),
    "Adam": Method(base="Adam"),
    "AdamW": Method(base="AdamW"),
    "LLQR (NGD)": Method("LLQR", "fisher"),
    "LLQR (Newton)": Method("LLQR", "newton"),
    "SAM": Method(probe="SAM"),
    "FisherSAM": Method(probe="FisherSAM"),
    "F-SAM": Method(probe="FriendlySAM"),
    "LLQR+SAM (NGD)": Method("LLQR", "fisher", "SAM"),
    "LLQR+SAM (Newton)": Method("LLQR", "newton", "SAM"),
    "LLQR+F-SAM (NGD)": Method("LLQR", "fisher", "FriendlySAM"),
    "LLQR+F-SAM (Newton)": Method("LLQR", "newton", "FriendlySAM"),
    "LLQR^Delta+SAM": Method("LLQR", "fisher", "SAM", transport=False),
    "NG": Method("NaturalGradient", "fisher"),
    "NG+SAM": Method("NaturalGradient", "fisher", "SAM", probe_options=ALONG_G),
    "NG+SAM/5": Method("NaturalGradient", "fisher", "SAM", probe_options=FIFTH_ALONG_G),
    "GM": Method("GradientMoments", **IN_BASES),
    "GM+SAM/5": Method("GradientMoments", probe="SAM", probe_options=FIFTH_ALONG_G, **IN_BASES),
}


def methods_where(label: str, chosen: Callable[[str, Method], bool]) -> Some:
    """Return the methods for which ``chosen(name, method)`` is true."""
    return Some(label, [name for name, method in METHODS.items() if chosen(name, method)])


def slug(name: str) -> str:
    """Return a name as it is typed: "LLQR+SAM (NGD)" is ``llqr-sam``, Newton's adds ``-newton``.

    Example:
        >>> slug("LLQR+F-SAM (Newton)"), slug("LLQR^Delta+SAM"), slug("CIFAR-10")
        ('llqr-f-sam-newton', 'llqr-delta-sam', 'cifar-10')
    """
    return name.lower().replace(" (ngd)", "").translate(str.maketrans("+^/ ", "----", "()"))
