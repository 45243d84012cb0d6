"""Bytes and operations of a step, of applying U and of a refresh, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import llqr
from llqr.curvature import RehearsedModel

from .algebra import moments_work, solve_work
from .work import Work, measure_work
from .workload import Workload

__all__ = ["Counts", "Network", "count_geometry", "count_network"]


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
        passes: of a refresh through the network, in the dtype of its parameters.
        algebra: of a refresh beside them, in U's dtype.
        messages: how many vectors of the parameters' size a refresh averages over processes.
        products: with the curvature, or samples.
    """

    name: str
    stored: int
    vectors: int
    whole: int
    apply: Work
    passes: Work
    algebra: Work
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
        passes = network.linearisation + network.product * products
        algebra = solve_work(geometry, applied, products)
        messages = 1.0 + products
        whole = 3 * vector  # a direction, its image, and the gradient, as tensors
    else:
        memory = geometry.memory()
        products = geometry.settings.samples
        passes = network.linearisation + network.sample * products
        algebra = moments_work(geometry, applied)
        messages = memory["preconditioner"] / vector
        whole = (products + 1) * vector
    return Counts(
        name,
        memory["preconditioner"],
        memory["refresh"],
        min(whole, memory["refresh"]),
        applied,
        passes,
        algebra,
        messages,
        products,
    )
