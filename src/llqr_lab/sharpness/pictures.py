"""Pictures of the sharpness: eigenvalues, spectral density, a plane of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llqr import sharpness

from ..common.drawing import new_figure, save_figure

__all__ = ["draw_density", "draw_eigenvalues", "draw_landscape", "save_both"]

BLUE = "#0072b2"


def draw_eigenvalues(found: sharpness.Eigenvalues, out: Path) -> list[Path]:
    """Draw the largest eigenvalues with their standard errors between the batches."""
    figure, axes = new_figure((1, 1), (5.5, 3.8))
    values = found.values.tolist()
    places = range(1, len(values) + 1)
    errors = None if found.standard_errors is None else found.standard_errors.tolist()
    axes.errorbar(places, values, yerr=errors, fmt="o", color=BLUE, capsize=3)
    axes.set(xlabel="number", ylabel="eigenvalue of the Hessian", xticks=list(places))
    axes.grid(alpha=0.3)
    bars = "" if errors is None else "Bars are standard errors between the batches. "
    return save_both(figure, out / "eigenvalues.png", f"{bars}{_data_of(found)}")


def draw_density(found: sharpness.Density, out: Path) -> list[Path]:
    """Draw the spectral density, on a logarithmic axis, with its standard error."""
    figure, axes = new_figure((1, 1), (5.5, 3.8))
    grid, values, errors = (t.numpy() for t in (found.grid, found.values, found.errors))
    floor = 1e-5 * values.max()  # far from all nodes a Gaussian has no meaning
    axes.semilogy(grid, values.clip(floor), color=BLUE, lw=1.5)
    low, high = (values - errors).clip(floor), (values + errors).clip(floor)
    axes.fill_between(grid, low, high, color=BLUE, alpha=0.2, lw=0)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.grid(alpha=0.3)
    caption = (
        f"Stochastic Lanczos quadrature: {len(found.nodes)} probes, {found.nodes.shape[1]} steps, "
        f"smoothed by {found.width:.2g}; the band is the standard error between the probes. "
    )
    return save_both(figure, out / "density.png", caption + _data_of(found))


def draw_landscape(found: sharpness.Landscape, out: Path) -> list[Path]:
    """Draw a plane of the loss as contours."""
    figure, axes = new_figure((1, 1), (5.5, 4.6))
    line = found.coordinates.numpy()
    # The first direction to the right.
    drawn = axes.contourf(line, line, found.losses.mT.numpy(), 24, cmap="viridis")
    figure.colorbar(drawn, ax=axes, label="loss")
    axes.plot(0, 0, "+", color="white", ms=10)
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    axes.locator_params(nbins=5)
    caption = "Two random directions with the filter norms of the weights; + is the network. "
    return save_both(figure, out / "landscape.png", caption + _data_of(found))


def _data_of(found: sharpness.Measurement) -> str:
    return f"{found.batches} training batches, evaluation mode."


def save_both(figure: Any, path: Path, caption: str) -> list[Path]:
    """Write PNG and SVG."""
    written = save_figure(figure, path, caption)
    figure.savefig(path.with_suffix(".svg"))
    return [written, path.with_suffix(".svg")]
