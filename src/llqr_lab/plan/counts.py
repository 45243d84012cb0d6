"""Bytes and operations of a step, of applying U and of a refresh, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import llqr
from llqr.curvature import RehearsedModel

from .algebra import directions_of, moments_steps, natural_refresh, on_host, solve_work
from .work import Work, fused_attention, measure_work
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
        linearisation: of a refresh of LLQR, whose graph is what it leaves.
        product: with the curvature.
    """

    parameters: int
    parameter_bytes: int
    forward: Work
    step: Work
    linearisation: Work
    product: Work


def count_network(workload: Workload) -> Network:
    """Count a step and the passes of a refresh."""
    parameters = workload.parameters

    def step() -> None:
        workload.forward()[0].backward()  # the outputs are not held

    with fused_attention():
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
    return Network(
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in workload.model.parameters()),
        forward,
        stepped,
        linearised,
        product,
    )


@dataclass(frozen=True)
class Counts:
    """What a geometry takes on a network.

    Attributes:
        name: of the geometry.
        stored: bytes of U with its averages.
        graph: bytes of a refresh that the network's tensors take.
        vectors: bytes of a refresh beside U and the graph.
        whole: the part of them that every process holds, however many there are.
        apply: what U is to a step: one application, or the rotations into its bases.
        passes: of a refresh through the network, in the dtype of its parameters.
        algebra: of a refresh beside them, in U's dtype.
        messages: how many vectors of the parameters' size a refresh averages over processes.
        products: with the curvature, or samples.
    """

    name: str
    stored: int
    graph: int
    vectors: int
    whole: int
    apply: Work
    passes: Work
    algebra: Work
    messages: float
    products: int


def count_geometry(
    name: str,
    geometry: llqr.LLQR | llqr.NaturalGradient | llqr.GradientMoments,
    workload: Workload,
    network: Network,
    products: int,
    steps: int | None = None,
    host: bool = True,
) -> Counts:
    """Count U, its application and its refresh; of GradientMoments, new bases are the refresh.

    Args:
        name: in the result.
        geometry: not bound yet.
        workload: the network.
        network: what was counted of it.
        products: that a refresh of LLQR uses.
        steps: inner steps that it makes until its directions are used up; None: all.
        host: whether it runs on a CPU, not on an accelerator.
    """
    geometry.bind(workload.model)
    if isinstance(geometry, llqr.GradientMoments):
        with on_host(host):
            return replace(_count_moments(geometry, network), name=name)
    gradients = {n: torch.empty_like(p) for n, p in geometry.parameters.items()}
    applied = measure_work(lambda: geometry.apply(gradients))
    count = _count_llqr if isinstance(geometry, llqr.LLQR) else _count_natural
    with on_host(host):
        counts = count(geometry, workload, network, products, steps)
    return replace(counts, name=name, apply=applied)


def _count_llqr(
    geometry: llqr.LLQR, workload: Workload, network: Network, products: int, steps: int | None
) -> Counts:
    vector = geometry.layout.numel * geometry.layout.dtype.itemsize
    counted = geometry._refresh_memory()
    # Within a product there are the network's tensors in the place of its result as one vector.
    cut = counted.product - 2 * vector
    counted = replace(counted, product=max(counted.product, cut + network.product.peak))
    made = steps or geometry.settings.steps
    directions = directions_of(geometry, products, made)
    vectors = max(counted.peak(directions), geometry._judgement_bytes())
    return Counts(
        "",
        geometry.memory()["preconditioner"],
        # The gradient is one of the vectors.
        max(network.linearisation.held - network.step.held, 0),
        vectors,
        min(3 * vector, vectors),  # a direction, its image, and the gradient, as tensors
        Work(),
        network.linearisation + network.product * products,
        solve_work(geometry, products, made),
        1.0 + products,
        products,
    )


def _count_natural(
    geometry: llqr.NaturalGradient,
    workload: Workload,
    network: Network,
    products: int,
    steps: int | None,
) -> Counts:
    vector = geometry.layout.numel * geometry.layout.dtype.itemsize
    stored, samples = geometry.memory()["preconditioner"], geometry.settings.samples
    refresh = natural_refresh(geometry, workload)
    backward = network.step + network.forward * -1.0
    passes = network.forward + backward * (samples + 1)
    graph = network.forward.held
    vectors = max(refresh.peak - graph, 0)
    return Counts(
        "",
        stored,
        graph,
        vectors,
        min((samples + 1) * vector, vectors),
        Work(),
        passes,
        refresh + passes * -1.0,
        stored / vector,
        samples,
    )


def _count_moments(geometry: llqr.GradientMoments, network: Network) -> Counts:
    usual, renewing = moments_steps(geometry)
    return Counts(
        "",
        geometry.memory()["preconditioner"],
        0,
        network.step.held + renewing.peak,  # beside the gradients
        network.step.held + renewing.peak,
        usual,
        Work(),
        renewing + usual * -1.0,
        0.0,
        0,
    )
