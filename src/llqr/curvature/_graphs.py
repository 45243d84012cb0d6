"""Autograd's graphs: gradients whose graph is kept, and which Functions a graph contains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._overrides import without_look_for_modes
from .linearised import is_replaced

__all__ = [
    "UNSEEN",
    "UnsuitableBackward",
    "custom_functions_in",
    "graph_of",
    "gradients_of",
    "leads_through",
    "node_names_in",
    "nodes_of",
    "rounding_is_small",
    "release_failed_backward",
]


#: Operations whose backward passes straight through a rounding, without a second derivative.
SURROGATES_OF_TORCH = ("FakeQuantizeLearnable",)

#: Whether an edge keeps its graph alive, as it does since torch 2.9; else the tensor must.
EDGES_KEEP_GRAPHS = "ownership_token" in GradientEdge._fields

#: What to suspect where no graph shows anything.
UNSEEN = "something that no graph shows (a hook by grad_fn.register_hook?)"


#: With the modes of this thread on: activation checkpointing runs parts of the forward there.
_grad = without_look_for_modes(torch.autograd.grad)


def gradients_of(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Return (d outputs / d inputs)' cotangents, None for an unused input; the graph stays.

    Hooks on outputs and inputs stay silent. An output may be the edge of a graph that a tensor
    hangs on, of which only the graph is wanted.
    """
    if not inputs:
        return []
    with _hooks_suspended([t for t in (*outputs, *inputs) if isinstance(t, Tensor)]):
        return list(
            _grad(
                outputs,
                inputs,
                cotangents,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )


@contextmanager
def _hooks_suspended(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the tensors' hooks from firing: what they would clip or log here is no gradient."""
    with torch._C.DisableTorchFunction():  # function modes would see every look at a tensor
        found = {id(hooks): hooks for t in tensors if (hooks := t._backward_hooks)}
    if not found:
        yield
        return
    # Autograd holds these very dictionaries, so that they are emptied and not replaced.
    kept = [(hooks, dict(hooks)) for hooks in found.values()]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in kept:
            hooks.update(entries)


def release_failed_backward() -> None:
    """Let go of the graph of a backward pass that raised an error.

    torch's engine leaves the nodes that were still to run in a queue of this thread, and empties it
    at the thread's next backward pass: so make one.
    """
    with torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        torch.autograd.grad(x + 1, x)


def graph_of(tensor: Tensor) -> Tensor | GradientEdge:
    """Return the edge that a tensor hangs on, for :func:`gradients_of`; its values may go."""
    return get_gradient_edge(tensor) if EDGES_KEEP_GRAPHS else tensor


def nodes_of(tensors: Sequence[Tensor], above: Sequence[Tensor] = ()) -> Iterator[Any]:
    """Walk over the nodes of a graph, each once, leaving out what ``above`` is computed by."""
    pending, seen = [t.grad_fn for t in tensors], {t.grad_fn for t in above}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def leads_through(z: Tensor, loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Tell whether every path from a loss to the parameters leads through z."""
    through = get_gradient_edge(z)
    ends = {get_gradient_edge(p).node for p in parameters}
    start = get_gradient_edge(loss)
    pending: list[tuple[Any, int]] = [(start.node, start.output_nr)]
    seen = set()
    while pending:
        node, number = pending.pop()
        if node is None or node in seen or (node is through.node and number == through.output_nr):
            continue
        if node is through.node or node in ends:  # by another output of z's operation, or past z
            return False
        seen.add(node)
        pending.extend(node.next_functions)
    return True


def node_names_in(tensors: Sequence[Tensor]) -> frozenset[str]:
    """Return which nodes the graph is made of."""
    return frozenset(node.name() for node in nodes_of(tensors))


class UnsuitableBackward(ValueError):
    """A backward of a user's own that does not do for a curvature."""

    def __init__(self, names: Sequence[str], reason: str) -> None:
        super().__init__(
            f"forward: with the backward of {', '.join(names)} {reason}. A backward of one's own "
            "must be linear in the gradient it gets (no clipping, normalising or random numbers) "
            "and, if it is not the derivative of the forward, differentiable: a straight-through "
            "estimate of f is x + (f(x) - x).detach()"
        )


def rounding_is_small(parameters: Sequence[Tensor], node_names: frozenset[str]) -> bool:
    """Tell whether the rounding of a backward pass is too small to look like a wrong one."""
    single = all(torch.finfo(p.dtype).eps < 1e-6 for p in parameters)
    return single and "ToCopyBackward0" not in node_names


def custom_functions_in(tensors: Sequence[Tensor], above: Sequence[Tensor] = ()) -> list[str]:
    """Return the names of users' autograd Functions in the graph above the parameters.

    With them, torch's operations that are surrogates without a second derivative.

    Args:
        tensors: where the graph ends.
        above: leave out what these are computed by.

    Raises:
        ValueError: reentrant activation checkpointing, whose inner parameters no graph shows.
    """
    names: dict[str, None] = {}
    for node in nodes_of(tensors, above):
        name = node.name()
        if name == "CheckpointFunctionBackward":
            raise ValueError(
                "forward: reentrant activation checkpointing hides its parameters from the graph, "
                "and their curvature would silently be zero; call "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False"
            )
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not is_replaced(node):
            names[name.removesuffix("Backward")] = None
        if name.startswith(SURROGATES_OF_TORCH):
            names[name.removesuffix("Backward0")] = None
    return list(names)
