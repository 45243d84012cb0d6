"""SAM: probe along the steepest ascent in the metric of U."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from .._checks import Schedule, check_choice
from .._vectors import Tensors, inner_products, scale_tensors, total_inner_product
from ._base import EPS0, Perturbation, Probe

__all__ = ["Along", "Direction", "Norm", "SAM"]

Norm = Literal["metric", "euclidean", "layer-metric", "layer-euclidean"]
Direction = Literal["raw", "normalised"]
Along = Literal["metric", "gradient"]


class SAM(Perturbation):
    r"""Probe along the steepest ascent in the metric of U.

    .. math:: \epsilon = \rho \frac{U g}{\sqrt{g^\top U g}}

    Args:
        rho: radius (see :class:`Perturbation`); .05 to .2 are usual for SGD training.
        norm: "metric" is the formula above (paper, algorithm 1); "euclidean" divides by |Ug| (what
            the authors' commands run); "layer-metric" and "layer-euclidean" take the norm of each
            layer and divide by the root of the number of layers. For U = I all four agree up to
            that root.
        direction: "raw" uses d = Ug; "normalised" uses d = Ug / |Ug| (only the metric norms tell
            them apart).
        along: "metric" probes along d = Ug; "gradient" along d = g, so that U acts in the step
            only and rho keeps the scale it has in SAM without U.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed (see :class:`Perturbation`).

    Source: P. Foret et al., Sharpness-aware minimization, ICLR 2021; in the metric of U: paper,
    algorithm 1.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.SAM(rho=0.05))
    """

    _is_bounded: ClassVar[bool] = True

    def __init__(
        self,
        rho: Schedule = 0.05,
        *,
        norm: Norm = "metric",
        direction: Direction = "raw",
        along: Along = "metric",
        start: int = 0,
        interval: int = 1,
    ) -> None:
        super().__init__(rho, start=start, interval=interval)
        check_choice("norm", norm, Norm)
        check_choice("direction", direction, Direction)
        check_choice("along", along, Along)
        self.norm, self.direction, self.along = norm, direction, along

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return rho d / norm with d = U g, or g with ``along="gradient"``."""
        return self._ascend(probe.gradients, probe)

    def _ascend(self, v: Tensors, probe: Probe) -> Tensors | None:
        """Return rho d / norm with d = U v (algorithm 1, line 5)."""
        d: Tensors = probe.metric(v) if self.along == "metric" else v
        if self.direction == "normalised":
            d = scale_tensors(d, probe._inverse_length(d, d))
        # v'Uv in the metric of U, |Uv|^2 in the Euclidean one.
        dual = v if self.norm.endswith("metric") else d
        if self.norm.startswith("layer"):
            return self._scale_by_layer(d, v, inner_products(dual, d), probe)
        unit = probe._inverse_length(dual, d)
        return None if isinstance(unit, float) and unit == 0 else probe.scale_by_radius(d, unit)

    def _scale_by_layer(
        self, d: Tensors, v: Tensors, squares: dict[str, float], probe: Probe
    ) -> Tensors | None:
        """Return rho d / (norm of the layer x root of the number of layers)."""
        layers, sums = probe.layers, dict[str, float]()
        for n, x in squares.items():
            sums[layers[n]] = sums.get(layers[n], 0.0) + x
        probe._seen.extend(sums.values())
        for layer, square in sums.items():
            if _fails_to_be_positive(square, {n: v[n] for n in v if layers[n] == layer}):
                return None
        root = math.sqrt(len(sums))
        units = {layer: 1 / math.sqrt(square + EPS0) for layer, square in sums.items()}
        return scale_tensors(d, {n: probe.radii[n] / root * units[layers[n]] for n in d})


def _fails_to_be_positive(square: float, v: Tensors) -> bool:
    """Tell whether the squared norm of v is not positive although v is not zero."""
    return not square > 0 and total_inner_product(v, v) > 0
