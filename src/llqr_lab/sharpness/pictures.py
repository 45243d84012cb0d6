"""Pictures of the sharpness: eigenvalues, spectral density, a line and a plane of the loss."""

from __future__ import annotations

from pathlib import Path

import torch

from llqr import sharpness

from ..common.drawing import new_figure, save_figure

__all__ = [
    "data_of",
    "draw_density",
    "draw_eigenvalues",
    "draw_landscape",
    "draw_line",
]

BLUE = "#0072b2"


def draw_eigenvalues(found: sharpness.Eigenvalues, out: Path) -> list[Path]:
    """Draw the largest eigenvalues with their standard errors between the batches."""
    figure, axes = new_figure((1, 1), (5.5, 3.8))
    values = found.values.tolist()
    places = range(1, len(values) + 1)
    errors = None if found.standard_errors is None else found.standard_errors.tolist()
    axes.errorbar(places, values, yerr=errors, fmt="o", color=BLUE, capsize=3)
    axes.set(
        title=f"The {len(values)} largest eigenvalues",
        xlabel="$i$",
        ylabel="eigenvalue of the Hessian, $\\lambda_i(\\nabla^2 L)$",
        xticks=list(places),
    )
    # From zero, so that the eye compares sizes.
    axes.set_ylim(*((0, 1.15 * max(values)) if min(values) > 0 else (None, None)))
    axes.grid(alpha=0.3)
    bars = "" if errors is None else " Bars are standard errors between the batches"
    residual = float(found.residuals.max())
    caption = f"{_data_of(found)}{bars}; residuals are at most {residual:.1g}."
    return save_figure(figure, out / "eigenvalues.png", caption)


def draw_density(found: sharpness.Density, out: Path) -> list[Path]:
    """Draw the spectral density, on a logarithmic axis, with its standard error."""
    figure, axes = new_figure((1, 1), (5.5, 3.8))
    grid, values, errors = (t.numpy() for t in (found.grid, found.values, found.errors))
    floor = 1e-5 * values.max()  # far from all nodes a Gaussian has no meaning
    axes.semilogy(grid, values.clip(floor / 10), color=BLUE, lw=1.5)  # leaves the axes below
    low, high = (values - errors).clip(floor), (values + errors).clip(floor)
    axes.fill_between(grid, low, high, color=BLUE, alpha=0.2, lw=0)
    axes.set(
        title=f"Spectral density of {found.dimension:,} eigenvalues",
        xlabel="eigenvalue of the Hessian, $\\lambda$",
        ylabel="density $\\phi(\\lambda)$ (its integral is 1)",
        ylim=(floor, None),
    )
    axes.grid(alpha=0.3)
    caption = (
        f"{_data_of(found)} Stochastic Lanczos quadrature: {len(found.nodes)} probes, "
        f"{found.nodes.shape[1]} steps, smoothed by {found.width:.2g}; the band is the standard "
        "error between the probes."
    )
    return save_figure(figure, out / "density.png", caption)


def draw_landscape(found: sharpness.Landscape, out: Path) -> list[Path]:
    """Draw a plane of the loss as contours."""
    from matplotlib import ticker

    figure, axes = new_figure((1, 1), (5.5, 4.6))
    line = found.coordinates.numpy()
    # The first direction to the right.
    drawn = axes.contourf(line, line, found.losses.mT.numpy(), 24, cmap="viridis")
    figure.colorbar(drawn, ax=axes, label="loss").locator = ticker.MaxNLocator(6)
    axes.plot(0, 0, "+", color="white", ms=10)
    axes.set(
        title="The loss on a plane, $L(w + \\alpha d_1 + \\beta d_2)$",
        xlabel="$\\alpha$",
        ylabel="$\\beta$",
        aspect="equal",
    )
    axes.locator_params(nbins=5)
    caption = (
        f"{_data_of(found)} d₁ and d₂ are random, with the filter norms of the weights: 1 is as "
        f"far as the filters are long. + is the network.{_error_of(found)}"
    )
    return save_figure(figure, out / "landscape.png", caption)


def draw_line(
    found: sharpness.Landscape, top: sharpness.Eigenvalues, rho: float, out: Path
) -> list[Path]:
    """Draw the loss along the eigenvector of the largest eigenvalue, beside its parabola."""
    figure, axes = new_figure((1, 1), (5.5, 3.8))
    t, losses = found.coordinates, found.losses
    half, value = len(t) // 2, float(top.values[0])
    slope = float((losses[half + 1] - losses[half - 1]) / (t[half + 1] - t[half - 1]))
    fine = torch.linspace(float(t[0]), float(t[-1]), 101)
    parabola = losses[half] + slope * fine + 0.5 * value * fine.square()
    axes.plot(t, losses, "-", color=BLUE, lw=1.8, label="loss")
    axes.plot(fine, parabola, "--", color="#666666", lw=1.2, label="$L + st + \\lambda_1 t^2/2$")
    if found.standard_errors is not None:
        low, high = losses - found.standard_errors, losses + found.standard_errors
        axes.fill_between(t, low, high, color=BLUE, alpha=0.2, lw=0)
    for side in (-rho, rho):
        axes.axvline(side, color="#666666", lw=0.8, ls=":")
    axes.set(
        title=f"The loss along the sharpest direction, $\\lambda_1$ = {value:.4g}",
        xlabel="distance $t$ from the weights along $v_1$",
        ylabel="loss $L(w + t v_1)$",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper center")
    caption = (
        f"{_data_of(found)} v₁ is the eigenvector of λ₁, of norm 1; s is the slope at the weights. "
        f"Dotted: the radius {rho:g} of the worst case.{_error_of(found, ' (band)')}"
    )
    return save_figure(figure, out / "line.png", caption)


def _error_of(found: sharpness.Landscape, where: str = "") -> str:
    """Return how exactly the loss at the weights is known."""
    if found.standard_errors is None:
        return ""
    middle = (len(found.coordinates) // 2,) * found.losses.dim()
    error = float(found.standard_errors[middle])
    return f" Standard error between the batches{where}: {error:.1g} at the weights."


def _data_of(found: sharpness.Measurement) -> str:
    return data_of(found.batches, found.examples)


def data_of(batches: int, examples: int | None) -> str:
    """Return on what was measured, as a sentence of a caption."""
    rows = "" if examples is None else f" ({examples:,} examples)"
    return f"On {batches} training {'batch' if batches == 1 else 'batches'}{rows}, evaluation mode."
