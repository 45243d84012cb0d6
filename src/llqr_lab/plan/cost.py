"""From counts to bytes per device, messages, seconds and overhead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .counts import Counts, Network
from .rates import Rates

__all__ = ["BASES", "Plan", "Setting", "make_plan"]

#: Tensors like the parameters, in float32, that a base optimizer keeps.
BASES = {"sgd": 0, "momentum": 1, "adamw": 2}


@dataclass(frozen=True)
class Setting:
    """How a training is spread and run.

    Attributes:
        world: devices.
        fsdp: whether parameters, gradients and the base's state are cut over them (FSDP2).
        shard: whether U is cut over them (always with ``fsdp``).
        base: a key of ``BASES``.
        passes: of a step: 2 with a perturbation that takes its own.
        every: steps from a refresh to the next.
    """

    world: int = 1
    fsdp: bool = False
    shard: bool = False
    base: str = "momentum"
    passes: int = 2
    every: float = 100


@dataclass(frozen=True)
class Plan:
    """What a geometry takes per device, in bytes, operations, bytes sent and seconds."""

    name: str
    parameters: int
    gradients: int
    base: int
    preconditioner: int
    activations: int
    step: int
    refresh_graph: int
    refresh_vectors: int
    refresh: int
    step_flops: float
    apply_flops: float
    refresh_flops: float
    step_sent: float
    refresh_sent: float
    step_seconds: float
    apply_seconds: float
    refresh_seconds: float
    overhead: float

    @property
    def peak(self) -> int:
        """The most bytes a device needs."""
        return max(self.step, self.refresh)

    def plain_row(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        return {**asdict(self), "peak": self.peak}


def make_plan(network: Network, counts: Counts, setting: Setting, rates: Rates) -> Plan:
    """Put the counts together for a number of devices."""
    n = setting.world
    cut = n if setting.fsdp else 1
    shards = n if setting.fsdp or setting.shard else 1
    gradients = network.step.held
    base = BASES[setting.base] * 4 * network.parameters // cut
    weights = network.parameter_bytes // cut
    stored = counts.stored // shards
    # What is gathered to run one layer at a time is small beside the activations.
    running = max(network.forward.peak, network.step.peak - gradients + gradients // cut)
    step = weights + running + base + stored
    if setting.passes > 1:  # those of the first pass wait for the second
        step += gradients // cut
    vectors = counts.whole + (counts.vectors - counts.whole) // shards
    # A refresh holds whole parameters also if training does not.
    refresh = weights + base + stored + counts.graph + vectors
    refresh += network.parameter_bytes if setting.fsdp else 0
    step_sent, refresh_sent = _bytes_sent(network, counts, setting)
    algebra = rates.of_algebra
    seconds = {
        "step": setting.passes * rates.seconds(network.step),
        "apply": algebra.seconds(counts.apply * (1 / shards)),
        "refresh": rates.seconds(counts.passes) + algebra.seconds(counts.algebra * (1 / shards)),
    }
    plain = seconds["step"] + _sent_by_base(network, setting) / rates.network
    extra = seconds["apply"] + (step_sent - _sent_by_base(network, setting)) / rates.network
    extra += (seconds["refresh"] + refresh_sent / rates.network) / setting.every
    return Plan(
        counts.name,
        weights,
        gradients // cut,
        base,
        stored,
        network.forward.held,
        step,
        counts.graph,
        vectors,
        refresh,
        setting.passes * network.step.operations,
        counts.apply.operations / shards,
        counts.passes.operations + counts.algebra.operations / shards,
        step_sent,
        refresh_sent,
        plain,
        seconds["apply"],
        seconds["refresh"],
        extra / plain,
    )


def _sent_by_base(network: Network, setting: Setting) -> float:
    """Return the bytes that a process sends in a step without a geometry."""
    n, gradient = setting.world, network.step.held
    others = (n - 1) / n
    # DistributedDataParallel: one all-reduce. FSDP2: two gathers of weights, one scatter.
    per_pass = (3 if setting.fsdp else 2) * others * gradient
    return setting.passes * per_pass


def _bytes_sent(network: Network, counts: Counts, setting: Setting) -> tuple[float, float]:
    """Return the bytes that a process sends in a step and in a refresh."""
    n, vector = setting.world, 4.0 * network.parameters
    others = (n - 1) / n
    sharded = setting.fsdp or setting.shard
    step = _sent_by_base(network, setting)
    if sharded:  # U g of each shard to all; with FSDP2 first the gradient, to where its block lies
        step += (2 if setting.fsdp else 1) * others * vector
    refresh = counts.messages * 2 * others * vector
    if sharded:  # directions are put together
        refresh += counts.products * others * vector
    if setting.fsdp:
        refresh += others * network.parameter_bytes
    return step, refresh
