"""Samples of the curvature: random vectors w with E[w w'] = C."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .._checks import check_integer
from ._curvatures import Curvature, as_curvature, check_has_samples
from ._forwards import Forward
from ._quadratic_model import normalised_weights
from ._sampled_forward import SampledForward

__all__ = ["CurvatureSamples", "curvature_samples"]


def curvature_samples(
    forward: Forward | Sequence[Forward],
    parameters: Iterable[Tensor],
    curvature: Literal["fisher"] | Curvature = "fisher",
    *,
    weights: Sequence[float] | None = None,
) -> CurvatureSamples:
    r"""Draw random vectors whose second moment is the curvature.

    .. math:: w = J^\top H^{1/2} e, \qquad E[e e^\top] = I, \qquad E[w w^\top] = J^\top H J = C

    A sample takes one backward pass and no second derivative of the network, so that any forward
    that trains can be sampled. The model runs in the caller's mode. Nothing is written to
    ``p.grad``.

    Args:
        forward: a function without arguments that returns ``(loss, outputs)``, with the outputs
            (logits) that the loss was computed from; or a list of such functions, whose losses and
            curvatures are averaged.
        parameters: the tensors to differentiate by; all lists are in this order.
        curvature: ``"fisher"`` or a :class:`llqr.Curvature` of the form J' H J.
        weights: how much each forward counts; equal by default, normalised to sum 1.

    Returns:
        A :class:`CurvatureSamples` with ``draw(count, generator)``, ``loss`` and ``gradient``. It
        keeps the graph of a single forward; of several, one has a graph at a time.

    Raises:
        ValueError: the curvature is Newton's; the loss is not a scalar, has no graph, is linear in
            the outputs or not convex in them; the outputs are missing or complex; a hook or a
            backward of one's own is not linear in the gradient it gets.

    Example:
        >>> import torch
        >>> from llqr.curvature import curvature_samples
        >>> layer = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> def forward():
        ...     z = layer(x)
        ...     return torch.nn.functional.cross_entropy(z, y), z
        >>> samples = curvature_samples(forward, layer.parameters())
        >>> [tuple(w.shape) for w in samples.draw(8, torch.Generator().manual_seed(0))]
        [(8, 2, 3), (8, 2)]
    """
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    if not forwards:
        raise ValueError("forward: got an empty list; pass at least one function")
    relative = normalised_weights(weights, len(forwards))
    curvature = as_curvature(curvature)
    check_has_samples(curvature)
    return CurvatureSamples(forwards, list(parameters), curvature, relative)


class CurvatureSamples:
    """Samples of C, and the loss and gradient of the same forwards.

    A forward runs when it is first asked for something. Of several forwards only one has a graph
    at a time: each is asked for its loss, its gradient and its samples while it has one, and runs
    again, with the same random numbers, only for more samples.

    Args:
        forwards: what to sample.
        parameters: the tensors to differentiate by.
        curvature: which matrix C is.
        weights: of the forwards, with sum 1.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        parameters: list[Tensor],
        curvature: Curvature,
        weights: Sequence[float],
    ) -> None:
        self._parameters = parameters
        self._active = [i for i, p in enumerate(parameters) if p.requires_grad]
        active = [parameters[i] for i in self._active]
        keep = len(forwards) == 1
        self._terms = [
            (w, SampledForward(f, active, curvature, keep))
            for w, f in zip(weights, forwards, strict=True)
        ]

    @property
    def loss(self) -> Tensor:
        """The (averaged) loss, a detached scalar."""
        total = [w * term.loss for w, term in self._terms]
        return torch.stack([x.to(total[0].device) for x in total]).sum()

    @property
    def gradient(self) -> list[Tensor]:
        """Gradient of the averaged loss, per parameter: zeros if it took no part."""
        total = [torch.zeros_like(p).detach() for p in self._parameters]
        for weight, term in self._terms:
            for i, g in zip(self._active, term.gradient, strict=True):
                if g is not None:
                    total[i].add_(g, alpha=weight)
        return total

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Draw samples w, of which the mean of w w' has expectation C.

        Several forwards share the samples: n of ``count`` fall to one of weight a, times
        sqrt(a count / n). With fewer samples than forwards, chance decides which are drawn from.

        Args:
            count: how many samples.
            generator: the only source of random numbers, on the CPU.

        Returns:
            One tensor (count, *p.shape) per parameter, in float32, or float64 for those in it.
            Zeros for parameters that do not require grad or took no part.
        """
        check_integer("count", count, low=1)
        result = [
            (torch.empty if p.requires_grad else torch.zeros)(
                count, *p.shape, dtype=_sample_dtype(p), device=p.device
            )
            for p in self._parameters
        ]
        start = 0
        shares = divide_samples([w for w, _ in self._terms], count, generator)
        for (_, term), (n, factor) in zip(self._terms, shares, strict=True):
            if n > 0:
                rows = [result[i][start : start + n] for i in self._active]
                term.draw_into(rows, n, factor, generator)
                start += n
        return result


def divide_samples(
    weights: Sequence[float], count: int, generator: torch.Generator
) -> list[tuple[int, float]]:
    """Return (n, factor on the samples) of every forward, so that the samples' mean is unbiased.

    Args:
        weights: a of the forwards, with sum 1.
        count: the sum of all n.
        generator: chooses forwards if there are more of them than samples.
    """
    counted = [i for i, a in enumerate(weights) if a > 0]
    shares = [0] * len(weights)
    if count < len(counted):
        # Systematic sampling: a forward of weight a is met count a times on average.
        ends = torch.tensor(weights, dtype=torch.float64, device="cpu").cumsum(0)
        u = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
        at = (torch.arange(count, device="cpu") + u) / count
        for i in torch.searchsorted(ends, at, right=True).clamp(max=counted[-1]).tolist():
            shares[i] += 1
        return [(n, 1.0) for n in shares]
    for i in counted:
        shares[i] = 1
    for _ in range(count - len(counted)):
        # The variance of the mean is the sum of a^2 / n: give where it falls most.
        best = max(counted, key=lambda i: weights[i] ** 2 / (shares[i] * (shares[i] + 1)))
        shares[best] += 1
    return [(n, (a * count / n) ** 0.5 if n else 1.0) for a, n in zip(weights, shares, strict=True)]


def _sample_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
