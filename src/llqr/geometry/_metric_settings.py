"""What a metric of structured blocks is told, and what its learning returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from .._checks import Schedule, check_choice, check_flags, check_integer
from ..curvature import Curvature, Fisher
from ._base import NormStatistics
from ._schedules import EVERY
from .structures import States
from .structures._application import Application

__all__ = ["SATURATED", "Application", "Learned", "MetricSettings", "describe_metric"]

#: Why a refresh is refused that no setting can help.
SATURATED = (
    "the loss has no curvature in its outputs (the network is certain of every answer, or the "
    "loss has become linear in `outputs`)"
)


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """What every metric of structured blocks is told: when to refresh, how to cut and apply U.

    Attributes:
        every: optimizer steps between refreshes; a number or a function of the step.
        start: first optimizer step before which a refresh is due.
        max_failures: refused refreshes in a row that are tolerated; one more raises. None: any
            number, and each in a row doubles the gap to the next, until one is accepted.
        block_size: sides of matrices wider than this are cut into blocks; None: whole.
        shard: with several processes, each keeps and applies its shard of U.
        application: "full", or "bfloat16" or "low-rank" for structures that apply faster so.
        batch_norm: the statistics that a refresh sees in a BatchNorm in training mode: "batch",
            as training does, or "running".
    """

    every: Schedule = 500
    start: int = 0
    max_failures: int | None = None
    block_size: int | None = 512
    shard: bool = False
    application: Application = "full"
    batch_norm: NormStatistics = "batch"

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        # A function of the step passes here; its values are checked when it is called.
        EVERY.check(self.every)
        check_integer("start", self.start, low=0)
        if self.max_failures is not None:
            check_integer("max_failures", self.max_failures, low=0)
        if self.block_size is not None:
            check_integer("block_size", self.block_size, low=1)
        check_flags(shard=self.shard)
        check_choice("application", self.application, Application)
        check_choice("batch_norm", self.batch_norm, NormStatistics)


def describe_metric(metric: str, structure: object, curvature: Curvature, settings: Any) -> str:
    """Return the call that makes a metric: its structure, and what differs from the defaults."""
    changed = {} if type(curvature) is Fisher else {"curvature": curvature}
    return describe_call(metric, structure, settings, changed)


def describe_call(
    metric: str, structure: object, settings: Any, others: Mapping[str, Any] | None = None
) -> str:
    """Return the call that makes a metric, with the settings that differ from the defaults.

    Args:
        metric: the name of its class.
        structure: of U.
        settings: a dataclass.
        others: arguments that are no settings.
    """
    changed = dict(others or {})
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != f.default:
            changed[f.name] = value
    arguments = [_shown(structure), *(f"{name}={_shown(v)}" for name, v in changed.items())]
    return f"{metric}({', '.join(arguments)})"


def _shown(value: object) -> str:
    # Functions and classes by their names: an address in memory tells nobody anything.
    return str(getattr(value, "__name__", None) or repr(value))


@dataclass(frozen=True)
class Learned:
    """What the learning of one refresh came to.

    Attributes:
        states: the new states, or None if the old ones stay.
        reason: why the old ones stay; None just if there are new ones.
        gradient: the flat gradient g that the report tells of U by, if there is one.
        numbers: further fields of :class:`llqr.RefreshReport`, such as ``products``.
        is_failure: whether a refusal is one that a setting can help, and so counts towards
            ``max_failures``.
    """

    states: States | None
    reason: str | None = None
    gradient: Tensor | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    is_failure: bool = True

    def __post_init__(self) -> None:
        """Refuse new states with a reason against them, and none without a reason."""
        if (self.states is None) == (self.reason is None):
            given = "none" if self.states is None else "new ones"
            raise ValueError(
                "Learned: expected new states, or states=None and a reason why the old ones stay; "
                f"got {given} and reason={self.reason!r}"
            )
