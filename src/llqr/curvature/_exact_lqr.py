"""The exact second-order step of a chain of layers, as a linear-quadratic regulator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ._curvatures import Curvature, Fisher, as_curvature
from ._linearize import twice_differentiable
from ._quadratic_model import _nonzero_rows, check_scale

__all__ = ["exact_lqr_step"]

Loss = Callable[[Tensor], Tensor]


def exact_lqr_step(
    layers: Iterable[nn.Module],
    x: Tensor,
    loss: Loss,
    curvature: str | Curvature = "fisher",
    damping: float = 0.0,
    *,
    scale: str | float = "mean",
) -> list[dict[str, Tensor]]:
    r"""Solve for the exact second-order step of a chain of layers by a Riccati recursion.

    The chain :math:`x_{i+1} = f_i(x_i, \theta_i)`, linearised around where it is, with
    :math:`A_i = \partial f_i / \partial x_i` and :math:`B_i = \partial f_i / \partial \theta_i`,
    is a linear system that the changes :math:`u_i` of the parameters control:

    .. math::
        \min_u \; q_N^\top \delta x_N + \tfrac12 \delta x_N^\top Q_N \delta x_N
        + \sum_i \tfrac12 \delta x_i^\top Q_i \delta x_i + u_i^\top M_i \delta x_i
        + \tfrac12 u_i^\top (R_i + \text{damping}\, I) u_i
        \quad \text{s.t.} \quad \delta x_{i+1} = A_i \delta x_i + B_i u_i, \; \delta x_0 = 0

    The gradient enters through :math:`q_N = \partial L / \partial x_N` alone, for
    :math:`g^\top u = q_N^\top \delta x_N` along the linearised dynamics. :math:`Q_N` is the second
    derivative of the loss (or divergence) in the outputs. With ``"newton"`` the stage costs are
    the second derivatives of :math:`\lambda_{i+1}^\top f_i` in :math:`(x_i, \theta_i)`, with the
    costates :math:`\lambda_N = q_N`, :math:`\lambda_i = A_i^\top \lambda_{i+1}`; otherwise
    (Gauss-Newton) they are zero. The stationary point is

    .. math:: u = -(C + \text{damping}\, I)^{-1} g

    with the full C, all cross-layer terms included. It is the minimum where C + damping I is
    positive definite; with ``"newton"`` C is indefinite in general, and the stationary point may
    be a saddle. ADD u to the parameters (the paper's code returns -u, to be subtracted).

    The modules run in their present mode. Buffers, ``p.grad`` and the random state stay as they
    are. This is a reference for small chains: the value matrices live on the flattened activations
    of the whole batch, so memory grows with (batch x features)^2, and a layer of n parameters
    costs an n x n solve.

    Args:
        layers: the modules f_0 ... f_{N-1}, each mapping one tensor to one tensor; an
            ``nn.Sequential`` will do. Layers without parameters are allowed. Parameters that do
            not require grad stay fixed.
        x: the input batch x_0, of any dtype.
        loss: a function of the last layer's output that returns the scalar mean loss.
        curvature: ``"fisher"``, ``"newton"`` or a :class:`llqr.Curvature`.
        damping: a number >= 0, added to the diagonal of C. Without damping a Gauss-Newton
            curvature is singular in general: a softmax ignores a shift of its logits, and a
            network often has more parameters than outputs.
        scale: a factor on C: ``"mean"`` is 1; ``"sum"`` is the number of output rows (last
            dimension = classes) whose loss gradient is not zero, which for ``"fisher"`` is the
            convention of the paper's code; a number is taken as it is.

    Returns:
        One dictionary a layer, in order: ``{parameter name in the layer: u}``, every u shaped
        like its parameter; an empty dictionary for a layer without trainable parameters.

    Raises:
        TypeError: a layer is not a module, or maps to something that is not a tensor.
        ValueError: an argument is out of range; layers share a parameter (tied weights are no
            chain); a layer draws random numbers; the loss is linear in the outputs; the system of
            a layer is singular.

    Source: paper, appendix A (equations 7 to 9, with U free).

    Example:
        >>> import torch, llqr
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> step = llqr.exact_lqr_step(net, x, lambda z: criterion(z, y), damping=0.1)
        >>> [sorted(u) for u in step]
        [['bias', 'weight'], [], ['bias', 'weight']]
        >>> before = criterion(net(x), y)
        >>> with torch.no_grad():
        ...     for layer, controls in zip(net, step):
        ...         for name, u in controls.items():
        ...             _ = layer.get_parameter(name).add_(u)
        >>> bool(criterion(net(x), y) < before)
        True
    """
    modules = _chain(layers, x)
    curvature = as_curvature(curvature)
    check_scale(scale)
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping: expected a number >= 0, got {damping!r}")
    with _unobserved(x):
        stages, outputs = _roll_out(modules, x)
        q_N, Q_N, factor = _terminal_cost(loss, outputs, curvature, scale)

        # Backward: the cost still to come is dx'P dx / 2 + p'dx, and its best control -(K dx + k).
        P, p, costate = factor * Q_N, q_N, factor * q_N
        policy = []
        for stage in reversed(stages):
            A, B = stage.linearise()
            Q, M, R = stage.no_costs() if curvature.gauss_newton else stage.costs(costate)
            H = M + B.T @ P @ A
            K, k = _feedback(R + B.T @ P @ B, H, B.T @ p, damping, stage.label)
            policy.append((A, B, K, k))
            P = Q + A.T @ P @ A - H.T @ K
            P = 0.5 * (P + P.T)  # symmetric but for rounding
            p = A.T @ p - H.T @ k
            costate = A.T @ costate

        # Forward: the input of the chain is fixed, dx_0 has no entries.
        dx = torch.zeros_like(stages[0].state)
        controls = []
        for stage, (A, B, K, k) in zip(stages, reversed(policy), strict=True):
            u = -(K @ dx + k)
            controls.append(stage.shaped(u))
            dx = A @ dx + B @ u
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
        self.state = self.vector(x) if index else x.new_empty(0, dtype=dtype)
        self.point = torch.cat([self.state, *(p.flatten() for p in self.parameters.values())])

    def __call__(self, v: Tensor) -> Tensor:
        """Return f(x, theta) in its own shape."""
        s, theta = v.split([self.state.numel(), sum(self.sizes)])
        # Copies, because a layer may write into its input (inplace=True) and into its buffers.
        x = (s.view_as(self.x) if s.numel() else self.x).clone()
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        result = functional_call(self.module, {**self.shaped(theta), **buffers}, (x,))
        if not isinstance(result, Tensor):
            raise TypeError(
                f"{self.label}: expected one tensor as output, got {type(result).__name__}; "
                "wrap the layer in a module that returns one tensor"
            )
        return result

    def linearise(self) -> tuple[Tensor, Tensor]:
        """Return A = df/ds and B = df/dtheta."""
        AB = _jacobian(lambda v: self.vector(self(v)), self.point)
        n = self.state.numel()
        return AB[:, :n], AB[:, n:]

    def costs(self, costate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, M, R: second derivatives of costate'f in (s, s), (theta, s), (theta, theta)."""
        W = _hessian(lambda v: costate @ self.vector(self(v)), self.point)
        n = self.state.numel()
        return W[:n, :n], W[n:, :n], W[n:, n:]

    def no_costs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, M, R of a Gauss-Newton curvature: zeros."""
        n, m = self.state.numel(), sum(self.sizes)
        zeros = self.point.new_zeros
        return zeros(n, n), zeros(m, n), zeros(m, m)

    def shaped(self, theta: Tensor) -> dict[str, Tensor]:
        """Cut a vector into {name: tensor}, shaped like the parameters."""
        pieces = zip(self.parameters.items(), theta.split(self.sizes), strict=True)
        return {name: piece.view(p.shape) for (name, p), piece in pieces}

    def vector(self, x: Tensor) -> Tensor:
        """Return the entries of an activation that can move."""
        return x.flatten() if x.is_floating_point() else x.new_empty(0, dtype=self.dtype)


def _roll_out(modules: list[nn.Module], x: Tensor) -> tuple[list[_Stage], Tensor]:
    """Return the stages of the chain, each with its input, and the outputs of the last."""
    dtypes = {p.dtype for m in modules for p in m.parameters() if p.requires_grad}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(map(str, dtypes))) or "none that requires grad"
        raise ValueError(
            f"layers: expected parameters all in float32 or all in float64, got {names}"
        )
    (dtype,) = dtypes
    stages, x = [], x.detach()
    for i, module in enumerate(modules):
        stage = _Stage(i, module, x, dtype)
        random_state = _random_state(x)
        x = stage(stage.point)
        if not torch.equal(random_state, _random_state(x)):
            raise ValueError(
                f"{stage.label}: draws random numbers, and the chain is evaluated several times; "
                "call .eval() on it, or leave it out"
            )
        if x.is_floating_point() and x.dtype != dtype:
            raise ValueError(f"{stage.label}: expected an output in {dtype}, got {x.dtype}")
        stages.append(stage)
    return stages, x


def _terminal_cost(
    loss: Loss, outputs: Tensor, curvature: Curvature, scale: str | float
) -> tuple[Tensor, Tensor, float]:
    """Return q_N, Q_N (not scaled), and the factor on C."""
    with torch.enable_grad():
        z = outputs.clone().requires_grad_()
        value = loss(z)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"loss: expected a scalar tensor, got {got}; reduce it with .mean()")
        graph = value.requires_grad
        q = (
            torch.autograd.grad(value, z, retain_graph=True, allow_unused=True)[0]
            if graph
            else None
        )
        if q is None:
            raise ValueError("loss: does not depend on the outputs that it is called with")
        rows = _nonzero_rows(value, [z])
    factor = float(rows) if scale == "sum" else 1.0 if scale == "mean" else float(scale)

    def objective(v: Tensor) -> Tensor:
        z = v.view_as(outputs)
        result = curvature.objective(loss(z), z, outputs) if curvature.gauss_newton else None
        return (loss(z) if result is None else result).reshape(())

    Q = _hessian(objective, outputs.flatten())
    if not (q.isfinite().all() and Q.isfinite().all()):
        raise ValueError(f"loss: its derivatives are not finite (the loss is {value.item()})")
    at_minimum = isinstance(curvature, Fisher) and not q.any()
    if curvature.gauss_newton and not Q.any() and not at_minimum:
        raise ValueError(
            "loss: its second derivative in the outputs is zero (it is linear in them), and so "
            "is C; end the chain at the logits, not at log-probabilities"
        )
    if curvature.gauss_newton:
        low, high = torch.linalg.eigvalsh(Q)[[0, -1]].tolist()
        if low < -len(Q) * torch.finfo(Q.dtype).eps * max(high, -low):
            warnings.warn(
                "the second derivative of the loss in the outputs is not positive semidefinite: "
                "the curvature C is indefinite",
                stacklevel=3,
            )
    return q.flatten(), Q, factor


def _feedback(G: Tensor, H: Tensor, h: Tensor, damping: float, label: str) -> tuple[Tensor, Tensor]:
    """Return K = (G + damping I)^-1 H and k = (G + damping I)^-1 h."""
    G = G + damping * torch.eye(len(G), dtype=G.dtype, device=G.device)
    condition = float(torch.linalg.cond(G, 1))  # infinite where G is not finite
    if condition * len(G) * torch.finfo(G.dtype).eps >= 1:
        raise ValueError(
            f"damping: at damping={damping!r} the system of {label} is singular (condition number "
            f"{condition:.0e}); raise the damping"
        )
    # LU and not Cholesky: with newton G is indefinite.
    Kk = torch.linalg.solve(G, torch.cat([H, h[:, None]], 1))
    return Kk[:, :-1], Kk[:, -1]


def _jacobian(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return df/dv as a matrix."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        return _rows(f(v), v)


def _hessian(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return the second derivative of a scalar."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        gradient = _rows(f(v)[None], v, create_graph=True)[0]
        return _rows(gradient, v)


def _rows(y: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """Return dy/dv, one backward pass a row: slow, but right for every layer autograd knows."""
    rows = [
        torch.autograd.grad(
            y_j, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )[0]
        for y_j in (y if y.requires_grad else ())
    ]
    return torch.stack(rows) if rows else v.new_zeros(len(y), len(v))


def _chain(layers: Iterable[nn.Module], x: Tensor) -> list[nn.Module]:
    """Return the layers as a list, or say why they are no chain."""
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers: expected a sequence of modules, got {type(layers).__name__}; "
            "a single layer goes in a list"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected one tensor, got {type(x).__name__}")
    modules, owner = list(layers), dict[int, str]()
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"layers[{i}]: expected a torch.nn.Module, got {module!r}")
        for name, p in module.named_parameters():
            here = f"layers[{i}].{name}"
            if p.requires_grad and id(p) in owner:
                raise ValueError(
                    f"layers: {here} is the same parameter as {owner[id(p)]}; tied weights are "
                    "controls of two stages at once, which the recursion cannot express"
                )
            owner[id(p)] = here
    return modules


def _random_state(x: Tensor) -> Tensor:
    states = [torch.get_rng_state()]
    return torch.cat(states + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else []))


@contextmanager
def _unobserved(x: Tensor) -> Iterator[None]:
    """Keep the random state, record no graph, and compute in full precision."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([x.device.index] if x.is_cuda else []))
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
        stack.enter_context(twice_differentiable())
        stack.enter_context(torch.no_grad())
        yield
