"""Where the second gradient is taken: SAM, ASAM, FisherSAM and FriendlySAM.

A perturbation turns gradients into a displacement eps of the parameters. It knows the metric only
as a function g -> U g, and no optimizer, module or step but what it is handed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ._checks import Schedule, check_choice, check_integer, check_number
from .distributed._sharded import local, summed

__all__ = ["ASAM", "FisherSAM", "FriendlySAM", "Perturbation", "SAM"]

EPS0 = 1e-12  # inside every square root
SHORT = 1 << 14  # entries up to which float64 costs nothing
TINY = 1e-20  # below, products of single entries may have left the range of float32
Tensors = Mapping[str, Tensor]
Metric = Callable[[Tensors], dict[str, Tensor]]


class Perturbation:
    """Say where the loss is probed (base class).

    Args:
        rho: radius; a number >= 0 or a function of the optimizer step. A parameter group's own
            option ``rho`` (number or function) goes before it; 0 leaves the group unperturbed.
        start: first optimizer step that is probed.
    """

    def __init__(self, rho: Schedule, *, start: int = 0) -> None:
        check_number("rho", rho, low=0, schedule=True)
        check_integer("start", start, low=0)
        self.rho, self.start = rho, start

    def displacement(
        self,
        gradients: Tensors,
        parameters: Tensors,
        rho: Mapping[str, float],
        metric: Metric,
        layers: Mapping[str, str],
    ) -> dict[str, Tensor] | None:
        """Return eps as {name: tensor}, or None where the metric gives g no positive norm.

        Args:
            gradients: g of the perturbed parameters, unscaled, in float32 or float64.
            parameters: the parameters themselves.
            rho: radius of each parameter.
            metric: the function g -> U g.
            layers: the layer of each parameter.
        """
        raise NotImplementedError

    def observe(self, gradients: Tensors) -> None:
        """See the clean gradients of a step, before it is known whether the step counts."""

    def commit(self) -> None:
        """Learn that the step counted."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return tensors to checkpoint as {parameter name: {key: tensor}}."""
        return {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over tensors that :meth:`state` returned."""

    def bind(self, parameters: Tensors) -> None:
        """Meet the parameters, by name."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({shown})"


class SAM(Perturbation):
    r"""Probe along the steepest ascent in the metric of U.

    .. math:: \epsilon = \rho \frac{U g}{\sqrt{g^\top U g}}

    Args:
        rho: radius (see :class:`Perturbation`); .05 to .2 are usual for SGD training.
        norm: "metric" is the formula above (paper, algorithm 1); "euclidean" divides by |Ug| (what
            the authors' commands run); "layer-metric" and "layer-euclidean" take the norm of each
            layer and divide by the root of the number of layers. All four agree up to that root
            for U = I.
        direction: "raw" uses d = Ug; "normalised" uses d = Ug / |Ug| (only the metric norms tell
            them apart).
        start: first optimizer step that is probed.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.SAM(rho=0.05))
    """

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        norm: str = "metric",
        direction: str = "raw",
        start: int = 0,
    ) -> None:
        super().__init__(rho, start=start)
        check_choice("norm", norm, ("metric", "euclidean", "layer-metric", "layer-euclidean"))
        check_choice("direction", direction, ("raw", "normalised"))
        self.norm, self.direction = norm, direction

    def displacement(
        self,
        gradients: Tensors,
        parameters: Tensors,
        rho: Mapping[str, float],
        metric: Metric,
        layers: Mapping[str, str],
    ) -> dict[str, Tensor] | None:
        """Return rho d / norm with d = U v."""
        return self._ascent(gradients, rho, metric, layers)

    def _ascent(
        self, v: Tensors, rho: Mapping[str, float], metric: Metric, layers: Mapping[str, str]
    ) -> dict[str, Tensor] | None:
        d = metric(v)
        if self.direction == "normalised":
            length = math.sqrt(total(squares(d, d)) + EPS0)
            d = scaled(d, dict.fromkeys(d, 1 / length))
        q = squares(v if self.norm.endswith("metric") else d, d)
        if not self.norm.startswith("layer"):
            whole = total(q)
            if _not_positive(whole, v):
                return None
            unit = 1 / math.sqrt(whole + EPS0)
            return scaled(d, {n: rho[n] * unit for n in d})
        sums: dict[str, float] = {}
        for n, x in q.items():
            sums[layers[n]] = sums.get(layers[n], 0.0) + x
        root = math.sqrt(len(sums))
        if any(_not_positive(s, {n: v[n] for n in v if layers[n] == k}) for k, s in sums.items()):
            return None
        units = {layer: 1 / math.sqrt(s + EPS0) for layer, s in sums.items()}
        return scaled(d, {n: rho[n] / root * units[layers[n]] for n in d})


class ASAM(Perturbation):
    r"""Probe in units of the weights' own size (Kwon et al., 2021).

    .. math:: \epsilon = \rho \frac{T^2 g}{|T g|}, \qquad T = |w| + \eta

    T is 1 for biases: parameters whose last name starts with "bias" or ends with "_bias". The
    probe ignores U; ``transport`` of the optimizer acts as given.

    Args:
        rho: radius (see :class:`Perturbation`).
        eta: added to the size of the weights, so that zeros move too.
        start: first optimizer step that is probed.
    """

    def __init__(self, rho: Schedule = 0.5, *, eta: float = 0.01, start: int = 0) -> None:
        super().__init__(rho, start=start)
        check_number("eta", eta, low=0)
        self.eta = eta

    def displacement(
        self,
        gradients: Tensors,
        parameters: Tensors,
        rho: Mapping[str, float],
        metric: Metric,
        layers: Mapping[str, str],
    ) -> dict[str, Tensor] | None:
        """Return rho T^2 g / |T g|."""
        t = {n: self._size(n, parameters[n], g) for n, g in gradients.items()}
        tg = {n: t[n] * g for n, g in gradients.items()}
        unit = 1 / math.sqrt(total(squares(tg, tg)) + EPS0)
        return {n: t[n] * x * (rho[n] * unit) for n, x in tg.items()}

    def _size(self, name: str, w: Tensor, like: Tensor) -> Tensor:
        leaf = name.rpartition(".")[2]
        if leaf.startswith("bias") or leaf.endswith("_bias"):
            return torch.ones_like(like)
        return w.detach().to(like.dtype).abs() + self.eta


class FisherSAM(Perturbation):
    r"""Probe in the metric of the squared gradient (Kim et al., 2022).

    .. math:: d = \frac{g}{g^2 + \eta}, \qquad \epsilon = \rho \frac{d}{\sqrt{g^\top d}}

    The probe ignores U; the paper's FisherSAM has no geometry at all. The direction depends on the
    scale of g: hand a GradScaler to passes, perturbed or minimize.

    Args:
        rho: radius (see :class:`Perturbation`).
        eta: damping of the squared gradient.
        start: first optimizer step that is probed.
    """

    def __init__(self, rho: Schedule = 0.1, *, eta: float = 0.1, start: int = 0) -> None:
        super().__init__(rho, start=start)
        check_number("eta", eta, low=0, open_low=True)
        self.eta = eta

    def displacement(
        self,
        gradients: Tensors,
        parameters: Tensors,
        rho: Mapping[str, float],
        metric: Metric,
        layers: Mapping[str, str],
    ) -> dict[str, Tensor] | None:
        """Return rho d / sqrt(g.d)."""
        d = {n: g / (g.square() + self.eta) for n, g in gradients.items()}
        unit = 1 / math.sqrt(total(squares(gradients, d)) + EPS0)
        return scaled(d, {n: rho[n] * unit for n in d})


class FriendlySAM(SAM):
    r"""Probe along the part of the gradient that is new (Li et al., 2024), through U.

    .. math:: v = g - \sigma m, \qquad \epsilon = \rho \frac{U v}{\sqrt{v^\top U v}}, \qquad
              m \leftarrow \lambda m + (1 - \lambda) g \text{ after } v

    The memory m starts at zero, holds raw gradients, advances also at rho = 0, and does not
    advance at a skipped step. The paper takes lambda = .6, .9 or .95 (appendix C).

    Args:
        rho: radius (see :class:`Perturbation`).
        sigma: how much of the memory is taken away.
        decay: lambda, in [0, 1).
        norm: as in :class:`SAM`.
        direction: as in :class:`SAM`.
        start: first optimizer step that is probed.
    """

    def __init__(
        self,
        rho: Schedule = 0.1,
        *,
        sigma: float = 1.0,
        decay: float = 0.9,
        norm: str = "metric",
        direction: str = "raw",
        start: int = 0,
    ) -> None:
        super().__init__(rho, norm=norm, direction=direction, start=start)
        check_number("sigma", sigma, low=0)
        check_number("decay", decay, low=0, high=1)
        self.sigma, self.decay = sigma, decay
        self._parameters: Tensors = {}
        self._memory: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def bind(self, parameters: Tensors) -> None:
        """Start the memory of new parameters at zero."""
        for name, p in parameters.items():
            if self._parameters.get(name, p) is not p:
                raise ValueError(
                    f"perturbation: this FriendlySAM remembers gradients of another {name!r}; make "
                    "a new one for this model"
                )
        known, self._memory, self._parameters = self._memory, {}, parameters
        for name, p in parameters.items():
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            fresh = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            self._memory[name] = known.get(name, fresh)

    def displacement(
        self,
        gradients: Tensors,
        parameters: Tensors,
        rho: Mapping[str, float],
        metric: Metric,
        layers: Mapping[str, str],
    ) -> dict[str, Tensor] | None:
        """Return SAM's displacement with v in the place of g."""
        v = {n: g - self.sigma * self._recall(n, g) for n, g in gradients.items()}
        return self._ascent(v, rho, metric, layers)

    def _recall(self, name: str, like: Tensor) -> Tensor:
        memory = self._memory[name]
        if (memory.device, memory.dtype) != (like.device, like.dtype):  # the model was moved
            memory = self._memory[name] = memory.to(like)
        return memory

    def observe(self, gradients: Tensors) -> None:
        """Form the next memory; it becomes the memory when the step counts."""
        keep = self.decay
        self._pending = {
            n: keep * self._recall(n, g) + (1 - keep) * g for n, g in gradients.items()
        }

    def commit(self) -> None:
        """Take the next memory."""
        self._memory.update(self._pending)
        self._pending = {}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the memory."""
        return {name: {"memory": m} for name, m in self._memory.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a memory; a frozen parameter's may be missing and stays as it is."""
        new = {}
        for name, memory in self._memory.items():
            value = state.get(name, {}).get("memory")
            if value is None and not self._parameters[name].requires_grad:
                value = memory
            if value is None or value.shape != memory.shape:
                raise ValueError(
                    f"state: no FriendlySAM memory of shape {tuple(memory.shape)} for {name!r}"
                )
            new[name] = value.detach().to(memory).clone()
        self._memory, self._pending = new, {}


def scaled(tensors: Tensors, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return each tensor times its factor."""
    if not tensors:
        return {}
    moved = torch._foreach_mul(list(tensors.values()), [factors[n] for n in tensors])
    return dict(zip(tensors, moved, strict=True))


def squares(a: Tensors, b: Tensors) -> dict[str, float]:
    """Return the inner product of each pair of tensors (of sharded ones, over all processes).

    Long ones are taken in float32, where torch's sums by halves keep seven digits; those that leave
    its range, and short ones, in float64.
    """
    pairs = {n: (local(a[n]), local(b[n])) for n in b}
    if not pairs:
        return {}
    short = {n: pair for n, pair in pairs.items() if pair[0].numel() <= SHORT}
    found = dict(zip(short, _dots(list(short.values())), strict=True))
    for n, (x, y) in pairs.items():
        if n not in found:
            found[n] = (x * y if x.dtype.itemsize >= 4 else x.float() * y.float()).sum()
    products = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    for n, p in products.items():
        if n not in short and not TINY < abs(p) < math.inf:
            products[n] = float(_dots([pairs[n]])[0])
    return summed({n: products[n] for n in b}, like=b)


def _dots(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return inner products in float64, with one conversion for all."""
    if not pairs:
        return []
    xs, ys = ([x.reshape(-1) for x in side] for side in zip(*pairs, strict=True))
    sizes = [x.numel() for x in xs]
    left = _in_double(xs, sizes)
    right = left if all(y is x for x, y in pairs) else _in_double(ys, sizes)
    return [torch.dot(x, y) for x, y in zip(left, right, strict=True)]


def _in_double(flat: list[Tensor], sizes: list[int]) -> list[Tensor]:
    joined = torch.cat(flat)
    wide = joined if joined.device.type == "mps" else joined.double()
    return list(torch.split_with_sizes(wide, sizes))


def total(numbers: Mapping[str, float]) -> float:
    """Return the sum of numbers, as torch adds them up."""
    return float(torch.tensor(list(numbers.values()), dtype=torch.float64).sum())


def _not_positive(q: float, v: Tensors) -> bool:
    """Tell whether the squared norm q of v fails to be positive although v is not zero."""
    return not q > 0 and total(squares(v, v)) > 0
