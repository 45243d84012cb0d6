"""The exact second-order step of a chain of layers, as a linear-quadratic regulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._checks import check_number
from ._warnings import warn_caller
from .curvature import (
    Curvature,
    as_curvature,
    check_scale,
    count_nonzero_rows,
    twice_differentiable,
)

__all__ = ["exact_lqr_step"]

#: Q_i, M_i and R_i of one layer, flat; None is zero.
StageCost = tuple[Tensor | None, Tensor | None, Tensor | None]


def exact_lqr_step(
    layers: Iterable[nn.Module],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    curvature: Literal["fisher", "newton"] | Curvature = "fisher",
    damping: float = 0.0,
    *,
    scale: Literal["mean", "sum"] | float = "mean",
    stage_costs: Sequence[StageCost | None] | None = None,
) -> list[dict[str, Tensor]]:
    r"""Solve for the exact second-order step of a chain of layers by a Riccati recursion.

    The chain :math:`x_{i+1} = f_i(x_i, \theta_i)` is linearised at the present parameters, with
    :math:`A_i = \partial f_i / \partial x_i` and :math:`B_i = \partial f_i / \partial \theta_i`.
    The changes :math:`u_i` of the parameters control it:

    .. math::
        \min_u \; q_N^\top \delta x_N + \tfrac12 \delta x_N^\top Q_N \delta x_N
        + \sum_i \tfrac12 \delta x_i^\top Q_i \delta x_i + u_i^\top M_i \delta x_i
        + \tfrac12 u_i^\top (R_i + \text{damping}\, I) u_i
        \quad \text{s.t.} \quad \delta x_{i+1} = A_i \delta x_i + B_i u_i, \; \delta x_0 = 0

    These are the paper's equations (8) and (9) without the structure of U: :math:`u_i` is free in
    place of :math:`-U_i g_i`, and the minimum solves equation (7). The gradient enters only through
    :math:`q_N = \partial L / \partial x_N`, because :math:`g^\top u = q_N^\top \delta x_N` along
    the linear dynamics. :math:`Q_N` is the second derivative of the loss (or divergence) in the
    outputs. With ``"newton"`` the stage costs are the second derivatives of
    :math:`\lambda_{i+1}^\top f_i` in :math:`(x_i, \theta_i)`, with the costates
    :math:`\lambda_N = q_N`, :math:`\lambda_i = A_i^\top \lambda_{i+1}`; otherwise (Gauss-Newton)
    they are zero. ``stage_costs`` are added to them. The recursion finds the stationary point

    .. math:: u = -(C + \text{damping}\, I)^{-1} g

    with all cross-layer terms of C: the minimum if C + damping I is positive definite; with
    ``"newton"`` C is indefinite in general, and the point may be a saddle. ADD u to the parameters
    (the paper's code returns -u). The modules run in their present mode; buffers, ``p.grad`` and
    the random state stay as they are. This is a reference for small chains: value matrices live on
    the flattened activations of the whole batch, and n parameters in a layer cost an n x n solve.

    Args:
        layers: the modules f_0 ... f_{N-1}, each from one tensor to one tensor (``nn.Sequential``
            will do), some without parameters. What does not require grad stays fixed.
        x: the input batch x_0, of any dtype.
        loss: a function from the last layer's output to the scalar mean loss.
        curvature: ``"fisher"``, ``"newton"`` or a :class:`llqr.Curvature`.
        damping: a number >= 0. At 0 a Gauss-Newton system is singular in general: a softmax ignores
            a shift of its logits, and most layers have more parameters than the batch has outputs.
        scale: a factor on C: ``"mean"`` is 1; ``"sum"`` is the number of output rows (last
            dimension = classes) whose loss gradient is not zero, for ``"fisher"`` the convention
            of the paper's code; a number is taken as it is.
        stage_costs: for each layer ``(Q_i, M_i, R_i)`` or None, in the order of its input's entries
            (the whole batch's) and of its parameters' that require grad: shapes (n, n), (p, n) and
            (p, p), where None is zero. They are taken as they are, without ``scale``; the first
            layer's input is fixed, so it has n = 0.

    Returns:
        One dictionary per layer, ``{parameter name in the layer: u}``, u shaped like the parameter.

    Raises:
        TypeError: a layer is no module, or its output is no tensor.
        ValueError: an argument is out of range; layers share a parameter; a layer draws random
            numbers; the loss is linear in the outputs; the system of a layer is singular; a stage
            cost has another shape, or Q_i or R_i is not symmetric.

    Source: paper, appendix A, equations (7) to (9).

    Example:
        >>> import torch, llqr
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> step = llqr.exact_lqr_step(net, x, lambda z: criterion(z, y), damping=0.1)
        >>> [sorted(controls) for controls in step]
        [['bias', 'weight'], [], ['bias', 'weight']]
    """
    modules, curvature = _check_chain(layers, x), as_curvature(curvature)
    check_scale(scale)
    check_number("damping", damping, low=0)
    with _without_side_effects(x):
        stages, outputs = _roll_out(modules, x)
        given = _check_stage_costs(stage_costs, stages)
        q_N, Q_N, factor = _terminal_cost(loss, outputs, curvature, scale)

        # Backward from the terminal cost of equation (9). From stage i on the rest costs at least
        # dx'P dx / 2 + p'dx. Put dx_{i+1} = A dx + B u, equation (8), into that of stage i + 1, add
        # the costs of stage i, and minimise over u: it is u = -(K dx + k).
        P, p, costate = factor * Q_N, q_N, factor * q_N
        policy = []
        for stage, own in zip(reversed(stages), reversed(given), strict=True):
            A, B = stage.linear_dynamics()
            derived = stage.stage_costs(None if curvature.gauss_newton else costate)
            Q, M, R = (a if b is None else a + b for a, b in zip(derived, own, strict=True))
            H = M + B.T @ P @ A  # (parameters, state): what multiplies u' and dx
            K, k = _feedback_gains(R + B.T @ P @ B, H, B.T @ p, damping, stage.label)
            policy.append((A, B, K, k))
            P = Q + A.T @ P @ A - H.T @ K
            P = 0.5 * (P + P.T)  # symmetric but for rounding
            p = A.T @ p - H.T @ k
            costate = A.T @ costate

        # Forward along equation (8). The input of the chain is fixed: dx_0 has no entries.
        dx, controls = torch.zeros_like(stages[0].state), []
        for stage, (A, B, K, k) in zip(stages, reversed(policy), strict=True):
            u = -(K @ dx + k)
            dx = A @ dx + B @ u
            controls.append(stage.by_name(u))
        return controls


class _Stage:
    """One layer f_i as a function of one vector v = (s, theta): its flat input and parameters.

    What cannot move has no entry in s: the input of the chain, and integers such as tokens.
    """

    def __init__(self, index: int, module: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
        self.label = f"layers[{index}] ({type(module).__name__})"
        self.module, self.x, self.dtype = module, x, dtype
        self.parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.state = self.flat_state(x) if index else x.new_empty(0, dtype=dtype)
        self.point = torch.cat([self.state, *(p.flatten() for p in self.parameters.values())])

    def __call__(self, v: Tensor) -> Tensor:
        """Return f(x, theta) in its own shape."""
        s, theta = torch.split(v, [self.state.numel(), sum(self.sizes)])
        # Copies, because a layer may write into its input (inplace=True) and into its buffers.
        x = (s.view_as(self.x) if s.numel() else self.x).clone()
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        result = functional_call(self.module, {**self.by_name(theta), **buffers}, (x,))
        if not isinstance(result, Tensor):
            got = type(result).__name__
            raise TypeError(f"{self.label}: expected one tensor as output, got {got}; wrap it")
        return result

    def linear_dynamics(self) -> tuple[Tensor, Tensor]:
        """Return A = df/ds and B = df/dtheta of equation (8)."""
        AB = _jacobian_matrix(lambda v: self.flat_state(self(v)), self.point)
        A, B = torch.split(AB, [self.state.numel(), sum(self.sizes)], dim=1)
        return A, B

    def stage_costs(self, costate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, M, R of equation (9): costate'f differentiated by ss, theta s, theta theta."""
        if costate is None:
            W = self.point.new_zeros(len(self.point), len(self.point))
        else:
            W = _hessian_matrix(lambda v: costate @ self.flat_state(self(v)), self.point)
        n = self.state.numel()
        return W[:n, :n], W[n:, :n], W[n:, n:]

    def by_name(self, theta: Tensor) -> dict[str, Tensor]:
        """Cut a vector into {name: tensor}, shaped like the parameters."""
        slices = zip(self.parameters.items(), torch.split(theta, self.sizes), strict=True)
        return {name: entries.view(p.shape) for (name, p), entries in slices}

    def flat_state(self, x: Tensor) -> Tensor:
        """Return the entries of an activation that can move."""
        return x.flatten() if x.is_floating_point() else x.new_empty(0, dtype=self.dtype)


def _roll_out(modules: list[nn.Module], x: Tensor) -> tuple[list[_Stage], Tensor]:
    """Return the stages of the chain, each with its input, and the outputs of the last."""
    dtypes = {p.dtype for m in modules for p in m.parameters() if p.requires_grad}
    if dtypes != {torch.float32} and dtypes != {torch.float64}:
        got = ", ".join(sorted(map(str, dtypes))) or "no parameter that requires grad"
        raise ValueError(f"layers: expected all parameters in float32 or float64, got {got}")
    (dtype,), stages, x = dtypes, list[_Stage](), x.detach()
    for i, module in enumerate(modules):
        stage = _Stage(i, module, x, dtype)
        before = _random_state(x)
        x = stage(stage.point)
        if not torch.equal(before, _random_state(x)):
            raise ValueError(f"{stage.label}: draws random numbers; call .eval() on it first")
        if x.is_floating_point() and x.dtype != dtype:
            raise ValueError(f"{stage.label}: expected an output in {dtype}, got {x.dtype}")
        stages.append(stage)
    return stages, x


def _check_stage_costs(
    costs: Sequence[StageCost | None] | None, stages: list[_Stage]
) -> list[StageCost]:
    """Return the costs of every stage, in its dtype, or say what does not fit."""
    if costs is None:
        return [(None, None, None)] * len(stages)
    if len(costs) != len(stages):
        raise ValueError(
            f"stage_costs: expected one entry per layer ({len(stages)}), got {len(costs)}"
        )
    found = list[StageCost]()
    for stage, cost in zip(stages, costs, strict=True):
        n, p = stage.state.numel(), sum(stage.sizes)
        entries = list[Tensor | None]()
        shapes = ("Q", (n, n)), ("M", (p, n)), ("R", (p, p))
        for (name, shape), matrix in zip(shapes, cost or (None, None, None), strict=True):
            if matrix is not None and tuple(matrix.shape) != shape:
                raise ValueError(
                    f"stage_costs: {name} of {stage.label} needs shape {shape}, got "
                    f"{tuple(matrix.shape)}"
                )
            if matrix is not None and name != "M" and not torch.allclose(matrix, matrix.mT):
                raise ValueError(f"stage_costs: {name} of {stage.label} is not symmetric")
            entries.append(None if matrix is None else matrix.to(stage.point))
        found.append((entries[0], entries[1], entries[2]))
    return found


def _terminal_cost(
    loss: Callable[[Tensor], Tensor], outputs: Tensor, curvature: Curvature, scale: float | str
) -> tuple[Tensor, Tensor, float]:
    """Return q_N and Q_N (not scaled) of equation (9), and the factor on C."""
    with torch.enable_grad():
        z = outputs.clone().requires_grad_()
        value = loss(z)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss: expected a scalar tensor, got {got}; reduce it with .mean()")
        try:
            (q,) = torch.autograd.grad(value, z, retain_graph=True)
        except RuntimeError as error:
            raise ValueError("loss: no gradient in the outputs it is called with") from error
        rows = count_nonzero_rows(value, [z])

    def objective(v: Tensor) -> Tensor:
        z = v.view_as(outputs)
        result = curvature.objective(loss(z), z, outputs) if curvature.gauss_newton else None
        return (loss(z) if result is None else result).reshape(())

    Q = _hessian_matrix(objective, outputs.flatten())
    if not (q.isfinite().all() and Q.isfinite().all()):
        raise ValueError(f"loss: its derivatives are not finite (the loss is {value.item()})")
    if curvature.gauss_newton:
        if q.any() and not Q.any():
            raise ValueError(
                "loss: linear in the outputs, so that C is zero; end the chain at the logits"
            )
        low, high = torch.linalg.eigvalsh(Q)[[0, -1]].tolist()
        if low < -len(Q) * torch.finfo(Q.dtype).eps * abs(high):
            warn_caller(
                "the second derivative of the loss in the outputs is not positive semidefinite: "
                "the curvature C is indefinite"
            )
    factor = float(rows) if scale == "sum" else 1.0 if scale == "mean" else float(scale)
    return q.flatten(), Q, factor


def _feedback_gains(
    G: Tensor, H: Tensor, h: Tensor, damping: float, label: str
) -> tuple[Tensor, Tensor]:
    """Return K = (G + damping I)^-1 H and k = (G + damping I)^-1 h."""
    G = G + damping * torch.eye(len(G), dtype=G.dtype, device=G.device)
    condition = float(torch.linalg.cond(G, 1))  # infinite if G is not finite
    if condition * len(G) * torch.finfo(G.dtype).eps >= 1:
        raise ValueError(
            f"damping: at damping={damping!r} the system of {label} is singular (condition number "
            f"{condition:.0e}); raise the damping"
        )
    # LU and not Cholesky: with newton G is indefinite.
    Kk = torch.linalg.solve(G, torch.cat([H, h[:, None]], 1))
    return Kk[:, :-1], Kk[:, -1]


def _jacobian_matrix(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return df/dv as a matrix."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        return _stacked_gradients(f(v), v)


def _hessian_matrix(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return the second derivative of a scalar function."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        return _stacked_gradients(_stacked_gradients(f(v)[None], v, create_graph=True)[0], v)


def _stacked_gradients(y: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """Return dy/dv, one backward pass per row: slow, but right for every layer autograd knows."""
    rows = [
        torch.autograd.grad(
            y_j, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )[0]
        for y_j in (y if y.requires_grad else ())
    ]
    return torch.stack(rows) if rows else v.new_zeros(len(y), len(v))


def _check_chain(layers: Iterable[nn.Module], x: Tensor) -> list[nn.Module]:
    """Return the layers as a list, or say why they do not form a chain."""
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a sequence of modules, got {type(layers).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected one tensor, got {type(x).__name__}")
    modules, owner = list(layers), dict[int, str]()
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"layers[{i}]: expected a torch.nn.Module, got {module!r}")
        for name, p in module.named_parameters():
            if p.requires_grad and id(p) in owner:
                raise ValueError(
                    f"layers: layers[{i}].{name} is {owner[id(p)]} again; with tied weights the "
                    "layers are no chain"
                )
            owner[id(p)] = f"layers[{i}].{name}"
    return modules


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


@contextmanager
def _without_side_effects(x: Tensor) -> Iterator[None]:
    """Keep the random state, record no graph, and compute in full precision."""
    generators = torch.random.fork_rng([x.device.index] if x.is_cuda else [])
    precision = torch.autocast(x.device.type, enabled=False)
    with generators, precision, twice_differentiable(), torch.no_grad():
        yield
