"""One forward, linearised: its gradient, and its products with the curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._curvatures import Curvature
from ._jacobian import (
    MissingDerivative,
    Rerun,
    by_differences,
    by_forward_mode,
    foreign,
    missing,
)
from ._linearize import ExactWeightNorm, twice_differentiable
from ._swapped_ops import SwappedOps, swapped_above

__all__ = ["Forward", "LinearLoss", "Term", "check_forward", "nonzero_rows"]

Forward = Callable[[], Any]
#: Every other one serves Newton.
WAYS = (
    "swapped operations",
    "double backward",
    "forward-mode differentiation",
    "central differences",
)
COSTS = {
    "double backward": "about as fast",
    "forward-mode differentiation": "about half as fast again",
    "central differences": "slower and accurate to a few digits alone",
}


class LinearLoss(ValueError):
    """A loss that has no second derivative in its outputs."""


class Term:
    """The retained graph of one forward.

    Attributes:
        loss: the loss, detached.
        gradient: its gradient, zeros where a parameter took no part.
        rows: output rows whose loss gradient is not zero (counted if asked for).
    """

    # What a product needs, by the way that is taken.
    _kept: Any
    _product: Callable[[Sequence[Tensor]], list[Tensor]]
    _outputs: list[Tensor]
    _points: list[Tensor]
    _hessian_of: list[tuple[Tensor, Tensor]]

    def __init__(
        self,
        forward: Forward,
        parameters: list[Tensor],
        curvature: Curvature,
        count_rows: bool,
        keep: bool = True,
    ) -> None:
        self._like, self._curvature, self._count_rows = parameters, curvature, count_rows
        self._active = [i for i, p in enumerate(parameters) if p.requires_grad]
        self._inputs = [parameters[i] for i in self._active]
        self._again = Rerun(forward, parameters)
        # What is tried in turn, until one has all derivatives.
        self._ways = list(WAYS if curvature.gauss_newton else WAYS[1::2])
        self._lacking: str | None = None
        self._keep = keep
        with twice_differentiable():
            self._linearise(forward)
        self._release()

    def _release(self) -> None:
        """Let the graph go, unless it is to be kept for the next product."""
        if not self._keep:
            self._kept = None
            self._outputs, self._points, self._hessian_of = [], [], []

    def product(self, d: Sequence[Tensor]) -> list[Tensor]:
        """Return C d, unscaled."""
        # Activation checkpointing runs parts of the forward again here, and must meet the same
        # kernels.
        with twice_differentiable():
            d = self._select(d)
            if not self._keep:
                self._linearise(self._again)
            while True:
                try:
                    if self._unsure:
                        self._check()
                    result = self._product(d)
                    break
                except RuntimeError as error:
                    self._give_way(error)
                    self._linearise(self._again)
        if self._lacking:
            warnings.warn(
                f"the forward uses {self._lacking}, which has no double backward: curvature "
                f"products go by {self._ways[0]}, which is {COSTS[self._ways[0]]}",
                stacklevel=2,
            )
            self._lacking = None
        self._release()
        return result

    def _give_way(self, error: RuntimeError) -> None:
        """Go on to the next way if the error is a derivative that does not exist."""
        operation = missing(error)
        if operation is None or len(self._ways) == 1:
            raise error
        self._ways.pop(0)
        self._lacking = self._lacking or operation

    def _linearise(self, forward: Forward) -> None:
        while True:
            try:
                return self._expand(forward)
            except RuntimeError as error:
                self._give_way(error)
                forward = self._again

    def _expand(self, forward: Forward) -> None:
        """Run the forward, and keep what a product by the present way needs."""
        curvature, way = self._curvature, self._ways[0]
        self._kept = None  # not two graphs at a time
        loss, outputs = _run(forward, swapped=way == "swapped operations")
        names = foreign([loss, *_tensors(outputs)])
        self._unsure = names if way != "central differences" else []
        self.loss = loss.detach()
        self.rows = 1
        if outputs is None and (curvature.gauss_newton or self._count_rows):
            raise ValueError(
                f"forward returned a loss alone, but curvature={curvature!r} (scale "
                "'mean' or 'sum') needs what the loss was computed from; return "
                "(loss, outputs) with the logits as `outputs`"
            )
        if curvature.gauss_newton:
            self._gauss_newton(loss, outputs, curvature)
        else:
            graph = _grad([loss], self._inputs, None, create_graph=way == "double backward")
            self.gradient = self._detached(graph)
            self._kept = graph
            self._product = self._newton_product
        if self._count_rows:
            self.rows = nonzero_rows(loss, _differentiable(outputs))

    def _gauss_newton(self, loss: Tensor, outputs: Any, curvature: Curvature) -> None:
        zs = _differentiable(outputs)
        self._places = [i for i, z in enumerate(_tensors(outputs)) if z.requires_grad]
        if self._ways[0] in WAYS[:2]:
            # One VJP gives the gradient and the linear map u -> J'u: backpropagate the loss with
            # cotangent 1 and the outputs with a cotangent u that is zero, and keep the graph in u.
            us = [torch.zeros_like(z, requires_grad=True) for z in zs]
            ones = torch.ones_like(loss)
            graph = _grad([loss, *zs], self._inputs, [ones, *us], create_graph=True)
            # Where a parameter reaches no output, its row of J' is zero and has no graph.
            vjp = [(i, g) for i, g in enumerate(graph) if g is not None and g.requires_grad]
            self._kept = us, vjp
        else:
            graph = _grad([loss], self._inputs, None)
        self.gradient = self._detached(graph)
        self._outputs = zs
        objective, points = _output_objective(loss, outputs, zs, curvature)
        gz = torch.autograd.grad(objective, points, create_graph=True, allow_unused=True)
        self._hessian_of = [(g, z) for g, z in zip(gz, points, strict=True) if g is not None]
        self._points = points
        self._check_hessian(curvature)
        self._product = self._gauss_newton_product

    def _check(self) -> None:
        """Compare with central differences: a graph with users' Functions may lack a dependence."""
        probe = []
        for p in self._inputs:
            noise = torch.Generator().manual_seed(0)
            draw = torch.randn(p.shape, generator=noise, dtype=torch.float32).to(p)
            probe.append(draw * p.detach().square().mean().sqrt().clamp(min=1e-3))
        if self._curvature.gauss_newton:
            found = self._jacobian_product(probe)
            sure = by_differences(self._rerun_outputs, self._inputs, probe)
        else:
            found = [*self._newton_product(probe)]
            sure = by_differences(self._rerun_gradient, self._inputs, probe)
        error = torch.stack(
            [(b if a is None else a - b).norm() for a, b in zip(found, sure, strict=True)]
        ).norm()
        if float(error) > 0.05 * float(torch.stack([b.norm() for b in sure]).norm()):
            raise MissingDerivative(f"{', '.join(self._unsure)}: a dependence is missing")
        self._unsure = []

    def _rerun_outputs(self) -> list[Tensor]:
        tensors = _tensors(self._again()[1])
        return [tensors[i] for i in self._places]

    def _rerun_gradient(self) -> list[Tensor]:
        with torch.enable_grad():
            loss, _ = check_forward(self._again())
            gradient = torch.autograd.grad(loss, self._inputs, allow_unused=True)
        return self._full(gradient)

    def _detached(self, graph: list[Tensor | None]) -> list[Tensor]:
        if all(g is None for g in graph):
            raise ValueError(
                "forward: the loss does not depend on any of the parameters; compute it with the "
                "module whose parameters these are"
            )
        return self._full([None if g is None else g.detach() for g in graph])

    def _hessian_product(self, zd: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return H v on the outputs, from the graph of the output gradient."""
        v = dict(zip(map(id, self._points), zd, strict=True))
        chosen: list[tuple[Tensor, Tensor]] = []
        for g, z in self._hessian_of:
            x = v[id(z)]
            if g.requires_grad and x is not None:
                chosen.append((g, x))
        if not chosen:
            return [None] * len(self._points)
        return _grad([g for g, _ in chosen], self._points, [x for _, x in chosen])

    def _check_hessian(self, curvature: Curvature) -> None:
        if not self._hessian_of:
            raise ValueError(
                "the loss was not computed from `outputs`: return the very tensor that the loss "
                "function was given (not a detached or recomputed copy)"
            )
        probes = []
        for z in self._points:
            # A generator of its own: a refresh leaves the global random state alone.
            noise = torch.Generator().manual_seed(0)
            draw = torch.randn(z.shape, generator=noise, dtype=torch.float32)
            probes.append(draw.to(device=z.device, dtype=z.dtype))
        images = self._hessian_product(probes)
        pairs = [(v, h) for v, h in zip(probes, images, strict=True) if h is not None]
        if not any(bool(h.any()) for _, h in pairs):
            # A divergence is stationary at equality: its gradient is zero, and that is no excuse.
            flat = all(not bool(g.any()) for g, _ in self._hessian_of)
            if flat and type(curvature).__name__ == "Fisher":
                return  # the loss is exactly minimal: nothing to learn, nothing wrong
            raise LinearLoss(
                "loss is linear in `outputs`, so its second derivative there is zero and U would "
                "grow without bound; return the logits (not log-probabilities) as `outputs`; if "
                "they are, they lie so far apart that training has diverged"
            )
        # A mean loss bends by about 1 an output entry; where the network is certain it hardly bends
        # at all, and what is left is rounding of either sign.
        noise = max(torch.finfo(v.dtype).eps for v, _ in pairs) ** 0.5
        if sum(float((v * h).sum()) for v, h in pairs) < -noise:
            warnings.warn(
                "the second derivative of the loss in the outputs is not positive semidefinite: "
                "the curvature C is indefinite",
                stacklevel=2,
            )

    def _jacobian_product(self, d: Sequence[Tensor]) -> list[Tensor | None]:
        """Return J d for every output."""
        if self._ways[0] == "forward-mode differentiation":
            return [*by_forward_mode(self._rerun_outputs, self._inputs, d)]
        if self._ways[0] == "central differences":
            return [*by_differences(self._rerun_outputs, self._inputs, d)]
        us, vjp = self._kept
        return _grad([g for _, g in vjp], us, [d[i] for i, _ in vjp]) if vjp else []

    def _gauss_newton_product(self, d: Sequence[Tensor]) -> list[Tensor]:
        zd = self._jacobian_product(d)
        hz = self._hessian_product(zd) if zd else []
        pairs = [(z, h) for z, h in zip(self._outputs, hz, strict=False) if h is not None]
        if not pairs:
            return self._full([None] * len(self._inputs))
        return self._full(_grad([z for z, _ in pairs], self._inputs, [h for _, h in pairs]))

    def _newton_product(self, d: Sequence[Tensor]) -> list[Tensor]:
        if self._ways[0] == "central differences":
            return by_differences(self._rerun_gradient, self._inputs, d)
        chosen = [
            (g, v) for g, v in zip(self._kept, d, strict=True) if g is not None and g.requires_grad
        ]
        if not chosen:
            return self._full([None] * len(self._inputs))
        return self._full(_grad([g for g, _ in chosen], self._inputs, [v for _, v in chosen]))

    def _select(self, d: Sequence[Tensor]) -> list[Tensor]:
        if len(d) != len(self._like):
            raise ValueError(
                f"d: expected {len(self._like)} tensors, one a parameter, got {len(d)}"
            )
        return [d[i].to(self._like[i].dtype) for i in self._active]

    def _full(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Spread values of the active parameters over all, zeros elsewhere."""
        known = dict(zip(self._active, values, strict=True))
        full = []
        for i, parameter in enumerate(self._like):
            value = known.get(i)
            full.append(torch.zeros_like(parameter).detach() if value is None else value)
        return full


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    create_graph: bool = False,
) -> list[Tensor | None]:
    if not inputs:
        return []
    return list(
        torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    )


def _run(forward: Forward, swapped: bool) -> tuple[Tensor, Any]:
    """Run the forward, with the operations whose second backward is cheap where they serve."""
    if not swapped:
        with ExactWeightNorm():
            return check_forward(forward())
    with SwappedOps():
        loss, outputs = check_forward(forward())
    return check_forward(forward()) if swapped_above(loss, _tensors(outputs)) else (loss, outputs)


def check_forward(result: Any) -> tuple[Tensor, Any]:
    """Split what a forward returned into (loss, outputs or None), or say what is wrong with it."""
    loss, outputs = result, None
    if isinstance(result, (tuple, list)):
        if len(result) != 2:
            raise ValueError(
                f"forward: expected a loss or (loss, outputs), got {len(result)} values"
            )
        loss, outputs = result
    if not isinstance(loss, Tensor):
        raise ValueError(f"forward: expected the loss as a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"forward: expected a scalar loss, got shape {tuple(loss.shape)}; "
            "reduce it, for example with .mean()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "forward: the loss has no graph (it does not require grad); compute it from the "
            "model's parameters, without torch.no_grad() or .detach()"
        )
    return loss, outputs


def _tensors(outputs: Any) -> list[Tensor]:
    return [z for z in pytree.tree_leaves(outputs) if isinstance(z, Tensor)]


def _differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors of ``outputs`` that carry a graph."""
    zs = [z for z in _tensors(outputs) if z.requires_grad]
    if not zs:
        raise ValueError(
            "forward: no tensor in `outputs` has a graph; return the logits themselves, "
            "not a detached copy"
        )
    return zs


def _output_objective(
    loss: Tensor, outputs: Any, zs: list[Tensor], curvature: Curvature
) -> tuple[Tensor, list[Tensor]]:
    """Return a scalar and the tensors in which its second derivative is H."""
    constant = pytree.tree_map(lambda z: z.detach() if isinstance(z, Tensor) else z, outputs)
    moving = {id(z): z.detach().requires_grad_() for z in zs}
    free = pytree.tree_map(lambda z: moving.get(id(z), z), outputs)
    objective = curvature.objective(loss, free, constant)
    if objective is not None:
        return objective, [moving[id(z)] for z in zs]
    # The loss is known only as a node above the outputs, so its derivative in one output must not
    # run through another.
    for i, z in enumerate(zs if len(zs) > 1 else []):
        others = zs[:i] + zs[i + 1 :]
        below = torch.autograd.grad(z.sum(), others, retain_graph=True, allow_unused=True)
        if any(b is not None for b in below):
            raise ValueError(
                "forward: one tensor of `outputs` is computed from another; hand over only what "
                "the loss reads, or use llqr.Divergence for a metric on intermediate layers"
            )
    return loss, zs


def nonzero_rows(loss: Tensor, zs: list[Tensor]) -> int:
    """Count the output rows whose loss gradient is not zero (several outputs: the largest)."""
    gz = torch.autograd.grad(loss, zs, retain_graph=True, allow_unused=True)
    rows = [g.reshape(-1, g.shape[-1] if g.dim() > 1 else 1) for g in gz if g is not None]
    return max([1, *(int(r.any(1).sum()) for r in rows)])
