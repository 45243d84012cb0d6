"""Bytes and operations of a step, of applying U and of a refresh, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import llqr
from llqr._allocations import Allocations
from llqr.curvature._rehearsal import RehearsedModel
from llqr.geometry.inner_solve._buffered import solve_in_buffers
from llqr.geometry.inner_solve._objective import Objective

from .workload import Workload

__all__ = ["Counts", "Work", "count_geometry", "count_network", "measure_work"]


@dataclass(frozen=True)
class Work:
    """What a computation does.

    Attributes:
        flops: floating-point operations of products and convolutions.
        moved: bytes that its operations read and write.
        peak: the most bytes that it holds at a time, beside what was there.
        held: bytes that it leaves.
    """

    flops: float = 0.0
    moved: float = 0.0
    peak: int = 0
    held: int = 0

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            max(self.peak, other.peak),
            self.held + other.held,
        )

    def __mul__(self, times: float) -> Work:
        """Again and again."""
        return replace(self, flops=self.flops * times, moved=self.moved * times)


class _Traffic(Allocations):
    """Count what operations read and write, too."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation; add up its tensors unless it only looks at one in another way."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and func is not torch.ops.aten.detach.default:
            touched = tree_leaves((args, kwargs, result))
            self.moved += sum(
                t.numel() * t.element_size()
                for t in {id(t): t for t in touched if isinstance(t, Tensor)}.values()
            )
        return result


def measure_work(compute: Callable[[], object]) -> Work:
    """Run a computation on the meta device and return what it does."""
    with _Traffic() as traffic, FlopCounterMode(display=False) as counter:
        kept = compute()
        held = traffic.held
    del kept
    return Work(counter.get_total_flops(), traffic.moved, traffic.peak, held)


@dataclass(frozen=True)
class Network:
    """What a network takes without a geometry.

    Attributes:
        parameters: how many are trained.
        parameter_bytes: of all, in their dtype.
        forward: what it leaves are the activations.
        step: forward and backward; what it leaves are the gradients.
        linearisation: of a refresh, whose graph is what it leaves.
        product: with the curvature.
        sample: one backward pass of a curvature sample.
    """

    parameters: int
    parameter_bytes: int
    forward: Work
    step: Work
    linearisation: Work
    product: Work
    sample: Work


def count_network(workload: Workload) -> Network:
    """Count a step and the passes of a refresh."""
    parameters = workload.parameters

    def step() -> None:
        loss, _ = workload.forward()
        loss.backward()

    forward = measure_work(workload.forward)
    stepped = measure_work(step)
    for p in parameters:
        p.grad = None
    made: list[RehearsedModel] = []
    linearised = measure_work(
        lambda: made.append(RehearsedModel(workload.forward, parameters)) or made
    )
    d = [torch.empty_like(p) for p in parameters]
    product = measure_work(lambda: made[0].product(d))
    sample = measure_work(made[0].sample)
    return Network(
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in workload.model.parameters()),
        forward,
        stepped,
        linearised,
        product,
        sample,
    )


@dataclass(frozen=True)
class Counts:
    """What a geometry takes on a network.

    Attributes:
        name: of the geometry.
        stored: bytes of U with its averages.
        vectors: bytes of a refresh beside U and the graph.
        whole: the part of them that every process holds, however many there are.
        apply: one application of U.
        refresh: the whole refresh.
        messages: how many vectors of the parameters' size a refresh averages over processes.
        products: with the curvature, or samples.
    """

    name: str
    stored: int
    vectors: int
    whole: int
    apply: Work
    refresh: Work
    messages: float
    products: int


def count_geometry(
    name: str,
    geometry: llqr.LLQR | llqr.NaturalGradient,
    workload: Workload,
    network: Network,
    products: int,
) -> Counts:
    """Count U, its application and its refresh.

    Args:
        name: in the result.
        geometry: not bound yet.
        workload: the network.
        network: what was counted of it.
        products: that a refresh of LLQR uses.
    """
    geometry.bind(workload.model)
    layout = geometry.layout
    gradients = {n: torch.empty_like(p) for n, p in geometry.parameters.items()}
    applied = measure_work(lambda: geometry.apply(gradients))
    vector = layout.numel * layout.dtype.itemsize
    if isinstance(geometry, llqr.LLQR):
        memory = geometry.memory(products=products)
        refresh = network.linearisation + network.product * products
        refresh = refresh + _solve_work(geometry, vector, products)
        messages = 1.0 + products
        whole = 3 * vector  # a direction, its image, and the gradient, as tensors
    else:
        memory = geometry.memory()
        products = geometry.settings.samples
        refresh = network.step + network.sample * products + _moments_work(geometry, products)
        messages = memory["preconditioner"] / vector
        whole = (products + 1) * vector
    return Counts(
        name,
        memory["preconditioner"],
        memory["refresh"],
        min(whole, memory["refresh"]),
        applied,
        refresh,
        messages,
        products,
    )


def _solve_work(geometry: llqr.LLQR, vector: int, products: int) -> Work:
    """Return the algebra of the inner solve."""
    layout, settings = geometry.layout, geometry.settings
    if geometry.blocks.linear and settings.tolerance:
        # On coefficients: five inner products of each pair with all before it, and what they are
        # made of; and a few dozen more vectors for the rate, the result and the report.
        passes = sum(5 * (i + 1) + 12 for i in range(products)) + 40
        return Work(moved=float(passes * vector))
    g = torch.empty(layout.numel, dtype=layout.dtype, device="meta")
    states = geometry.blocks.identity(torch.device("meta"))
    image = torch.empty_like(g)
    objective = Objective(geometry.blocks, g, lambda u: image, 0.0)
    options = replace(settings.learner_at(0).options, steps=2, lr=1.0, clip=None)
    with torch.no_grad():
        two = measure_work(
            lambda: solve_in_buffers(objective, states, settings.inner_solver, options)
        )
    # Each product that is answered from earlier ones combines them.
    answers = Work(moved=6.0 * vector * settings.steps)
    return two * (settings.steps / 2) + answers


def _moments_work(geometry: llqr.NaturalGradient, samples: int) -> Work:
    """Return the algebra of the averages: products with samples, and bases that follow them."""
    flops = moved = 0.0
    for part, state in zip(geometry.parts, geometry.states, strict=True):
        entries = part.group.numel
        moved += 4 * 3.0 * samples * entries
        moved += 4 * 3.0 * sum(v.numel() for v in state.values())
        for basis in ("QA", "QB"):
            if basis in state:
                side = state[basis].shape[-1]
                # The samples in the bases; and at every renewal W W' and 9 products of the bases,
                # in float64, which count twice.
                flops += 2.0 * samples * entries * side
                renewal = 2.0 * samples * entries * side + 18.0 * part.count * side**3
                flops += renewal / geometry.settings.renew_every
    return Work(flops=flops, moved=moved)
