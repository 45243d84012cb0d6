"""The local quadratic model of the loss: its gradient, and products with its curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._curvatures import Curvature, as_curvature
from ._linearize import twice_differentiable
from ._swapped_ops import SwappedOps, swapped_above

__all__ = ["QuadraticModel", "quadratic_model"]

Forward = Callable[[], Any]
Scale = str | float


def quadratic_model(
    forward: Forward | Sequence[Forward],
    parameters: Iterable[Tensor],
    curvature: str | Curvature = "fisher",
    *,
    scale: Scale = "mean",
    weights: Sequence[float] | None = None,
) -> QuadraticModel:
    r"""Expand the loss to second order around the current parameters.

    .. math:: m(u) = g^\top u + \tfrac12 u^\top C u

    One eager forward is run and its graph kept; every product is then two (Newton: one)
    backward passes through it. The model runs in the caller's mode: call ``model.eval()`` first
    if batch statistics or dropout are not wanted. Nothing is written to ``p.grad``.

    Args:
        forward: a function without arguments that returns the scalar loss, or ``(loss, outputs)``
            with the outputs (logits) that the loss was computed from; or a list of such
            functions, whose losses and curvatures are averaged.
        parameters: the tensors to differentiate by; all vectors are lists in this order.
        curvature: ``"fisher"``, ``"newton"`` or a :class:`llqr.Curvature`.
        scale: a factor on C: ``"mean"`` is 1; ``"sum"`` is the number of output rows (last
            dimension = classes) whose loss gradient is not zero, as in the authors' code; a
            number is taken as it is.
        weights: how much each forward counts; equal by default, normalised to sum 1.

    Returns:
        A :class:`QuadraticModel` with ``gradient``, ``product(d)``, ``value(u)`` and ``loss``.

    Raises:
        ValueError: the loss is not a scalar, has no graph, is linear in the outputs, or the
            outputs are missing for a curvature that needs them.

    Example:
        >>> import torch, llqr
        >>> layer = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> def forward():
        ...     z = layer(x)
        ...     return torch.nn.functional.cross_entropy(z, y), z
        >>> model = llqr.quadratic_model(forward, layer.parameters())
        >>> [tuple(v.shape) for v in model.product(model.gradient)]
        [(2, 3), (2,)]
    """
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards:
        raise ValueError("forward: got an empty list; pass at least one function")
    shares = normalised(weights, len(forwards))
    parameters = list(parameters)
    curvature = as_curvature(curvature)
    check_scale(scale)
    terms = [_Term(f, parameters, curvature, scale == "sum") for f in forwards]
    return QuadraticModel(terms, shares, scale)


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights of ``count`` forwards, summing to one (equal when None)."""
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count} numbers, one a forward, got {len(values)}")
    total = sum(values)
    if not (all(w >= 0 for w in values) and 0 < total < float("inf")):
        raise ValueError(f"weights: expected numbers >= 0 with a positive sum, got {values}")
    return [w / total for w in values]


def check_scale(scale: Scale) -> None:
    """Refuse a scale that is neither ``"mean"``, ``"sum"`` nor a positive number."""
    if scale in ("mean", "sum"):
        return
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < float("inf"):
        return
    raise ValueError(f"scale: expected 'mean', 'sum' or a number > 0, got {scale!r}")


class QuadraticModel:
    r"""Gradient g and curvature products C d of a loss at fixed parameters.

    Attributes:
        loss: the (averaged) loss, a detached scalar.
        gradient: g, a list of tensors shaped like the parameters; zeros where a parameter took
            no part.
        scale: the factor on C, as a number.
        products: how many curvature products were computed so far.
    """

    def __init__(self, terms: list[_Term], weights: list[float], scale: Scale) -> None:
        self._terms = list(zip(weights, terms, strict=True))
        if scale == "sum":
            self.scale = float(sum(t.rows for w, t in self._terms if w > 0))
        else:
            self.scale = 1.0 if scale == "mean" else float(scale)
        self.products = 0
        self.loss = _mean([(w, [t.loss]) for w, t in self._terms])[0]
        self.gradient = _mean([(w, t.gradient) for w, t in self._terms])

    def product(self, d: Sequence[Tensor]) -> list[Tensor]:
        """Return C d.

        Args:
            d: a direction, one tensor a parameter, shaped like it.
        """
        self.products += 1
        result = _mean([(w, t.product(d)) for w, t in self._terms])
        return result if self.scale == 1.0 else [v * self.scale for v in result]

    def value(self, u: Sequence[Tensor]) -> Tensor:
        """Return g'u + u'Cu / 2, a scalar tensor."""
        cu = self.product(u)
        terms = [(a * (g + 0.5 * c)).sum() for a, g, c in zip(u, self.gradient, cu, strict=True)]
        return torch.stack(terms).sum()


def _mean(terms: list[tuple[float, list[Tensor]]]) -> list[Tensor]:
    """Return the weighted sum of lists of tensors (one list: the list itself)."""
    if len(terms) == 1:
        return terms[0][1]
    return [
        torch.stack([w * v for (w, _), v in zip(terms, vs, strict=True)]).sum(0)
        for vs in zip(*(t for _, t in terms), strict=True)
    ]


class _Term:
    """The retained graph of one forward."""

    def __init__(
        self, forward: Forward, parameters: list[Tensor], curvature: Curvature, count_rows: bool
    ) -> None:
        with twice_differentiable():
            loss, outputs = _run(forward, swapped=curvature.gauss_newton)
            self._like = parameters
            self._active = [i for i, p in enumerate(parameters) if p.requires_grad]
            self._inputs = [parameters[i] for i in self._active]
            self.loss = loss.detach()
            self.rows = 1
            if outputs is None and (curvature.gauss_newton or count_rows):
                raise ValueError(
                    f"forward returned a loss alone, but curvature={curvature!r} (scale "
                    "'mean' or 'sum') needs what the loss was computed from; return "
                    "(loss, outputs) with the logits as `outputs`"
                )
            if curvature.gauss_newton:
                self._gauss_newton(loss, outputs, curvature)
            else:
                graph = _grad([loss], self._inputs, None, create_graph=True)
                self.gradient = self._detached(graph)
                self._gradient_graph = graph
                self._product = self._newton_product
            if count_rows:
                self.rows = _nonzero_rows(loss, _differentiable(outputs))

    def _gauss_newton(self, loss: Tensor, outputs: Any, curvature: Curvature) -> None:
        zs = _differentiable(outputs)
        # One VJP gives the gradient and the linear map u -> J'u: backpropagate the loss with
        # cotangent 1 and the outputs with a cotangent u that is zero, and keep the graph in u.
        us = [torch.zeros_like(z, requires_grad=True) for z in zs]
        graph = _grad([loss, *zs], self._inputs, [torch.ones_like(loss), *us], create_graph=True)
        self.gradient = self._detached(graph)
        # Where a parameter reaches no output, its row of J' is zero and has no graph.
        self._vjp = [(i, g) for i, g in enumerate(graph) if g is not None and g.requires_grad]
        self._cotangents, self._outputs = us, zs
        objective, points = _output_objective(loss, outputs, zs, curvature)
        gz = torch.autograd.grad(objective, points, create_graph=True, allow_unused=True)
        self._hessian_of = [(g, z) for g, z in zip(gz, points, strict=True) if g is not None]
        self._points = points
        self._check_hessian(curvature)
        self._product = self._gauss_newton_product

    def product(self, d: Sequence[Tensor]) -> list[Tensor]:
        """Return C d, unscaled."""
        # Activation checkpointing runs parts of the forward again here, and must meet the same
        # kernels.
        with twice_differentiable():
            return self._product(self._select(d))

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
            raise ValueError(
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

    def _gauss_newton_product(self, d: Sequence[Tensor]) -> list[Tensor]:
        graph = [g for _, g in self._vjp]
        zd = _grad(graph, self._cotangents, [d[i] for i, _ in self._vjp]) if graph else []
        hz = self._hessian_product(zd) if zd else []
        pairs = [(z, h) for z, h in zip(self._outputs, hz, strict=False) if h is not None]
        if not pairs:
            return self._full([None] * len(self._inputs))
        return self._full(_grad([z for z, _ in pairs], self._inputs, [h for _, h in pairs]))

    def _newton_product(self, d: Sequence[Tensor]) -> list[Tensor]:
        chosen = [
            (g, v)
            for g, v in zip(self._gradient_graph, d, strict=True)
            if g is not None and g.requires_grad
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
        return check_forward(forward())
    with SwappedOps():
        loss, outputs = check_forward(forward())
    zs = [z for z in pytree.tree_leaves(outputs) if isinstance(z, Tensor)]
    return check_forward(forward()) if swapped_above(loss, zs) else (loss, outputs)


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


def _differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors of ``outputs`` that carry a graph."""
    zs = [z for z in pytree.tree_leaves(outputs) if isinstance(z, Tensor) and z.requires_grad]
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


def _nonzero_rows(loss: Tensor, zs: list[Tensor]) -> int:
    """Count the output rows whose loss gradient is not zero (several outputs: the largest)."""
    gz = torch.autograd.grad(loss, zs, retain_graph=True, allow_unused=True)
    rows = [g.reshape(-1, g.shape[-1] if g.dim() > 1 else 1) for g in gz if g is not None]
    return max([1, *(int(r.any(1).sum()) for r in rows)])
