"""Proposition B.1 on noisy logistic regression, with U learned by real LLQR refreshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from llqr_lab.common.output import progress_bar

from .findings import HOLDS, LIMITS, Finding

__all__ = ["HORIZONS", "Run", "check_transfer", "fitted_slope", "train_run"]

F64 = torch.float64
HORIZONS = (2**8, 2**10, 2**12, 2**14)
ROWS, FEATURES, BATCH = 256, 8, 8
ALPHA, RHO = 4.0, 1.0  # divided by sqrt(T)
BOUNDS = (0.1, 10.0)


@dataclass(frozen=True)
class Run:
    """The gradients of the whole loss and the metrics of one run of T steps.

    Attributes:
        gradients: (T, d).
        metrics: (T, d, d), U_t.
        change: largest |Ug - g| / |g| that a refresh reported.
    """

    gradients: Tensor
    metrics: Tensor
    change: float

    def in_metric(self, metrics: Tensor) -> Tensor:
        """Return g'Ug at every step (T,), for metrics (T, d, d) or one (d, d)."""
        return ((metrics @ self.gradients[..., None])[..., 0] * self.gradients).sum(-1)

    @property
    def discrepancy(self) -> Tensor:
        """The operator norm of U_t - U_f at every step (T,); U_f is the last metric."""
        return torch.linalg.eigvalsh(self.metrics - self.metrics[-1]).abs().amax(-1)


def random_data(seed: int) -> tuple[Tensor, Tensor]:
    """Return features of different scales and labels of which a fifth is flipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, dtype=F64, generator=generator)
    x *= torch.logspace(0, -0.7, FEATURES, dtype=F64)
    truth = torch.randn(FEATURES, dtype=F64, generator=generator)
    flipped = torch.rand(ROWS, generator=generator) < 0.2
    return x, ((x @ truth > 0) ^ flipped).to(F64)


def train_run(steps: int, seed: int = 0) -> Run:
    """Train LLQR+SAM with alpha and rho ~ 1/sqrt(T) and 16 refreshes on their own minibatches."""
    x, y = random_data(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = nn.Linear(FEATURES, 1, bias=False, dtype=F64)
    model.weight.data = 3 * torch.randn(1, FEATURES, dtype=F64, generator=generator)
    geometry = llqr.LLQR("dense", every=steps // 16, lr=1.0, ema=0.7, bounds=BOUNDS, tolerance=0)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=ALPHA / steps**0.5),
        model,
        geometry=geometry,
        perturbation=llqr.SAM(RHO / steps**0.5),
    )
    metric, changes = torch.eye(FEATURES, dtype=F64), []

    def read_metric(optimizer: llqr.Optimizer, report: llqr.RefreshReport) -> None:
        nonlocal metric
        units = torch.eye(FEATURES, dtype=F64)
        metric = torch.cat([geometry.apply({"weight": unit[None]})["weight"] for unit in units])
        changes.append(report.change)

    optimizer.register_refresh_hook(read_metric)

    def forward_on(rows: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        inputs, targets = x[rows], y[rows]

        def forward() -> tuple[Tensor, Tensor]:
            logits = model(inputs)[:, 0]
            return F.binary_cross_entropy_with_logits(logits, targets), logits

        return forward

    batches = torch.randint(ROWS, (steps, BATCH), generator=generator)
    weights, metrics = [], []
    for batch in progress_bar(batches, f"T = {steps}"):
        if optimizer.refresh_due:
            optimizer.refresh(forward_on(torch.randint(ROWS, (64,), generator=generator)))
        weights.append(model.weight.detach()[0].clone())
        metrics.append(metric)
        optimizer.minimize(forward_on(batch))
    residuals = (torch.stack(weights) @ x.mT).sigmoid() - y
    return Run(residuals @ x / ROWS, torch.stack(metrics), max(changes))


def fitted_slope(horizons: list[int], means: list[float]) -> float:
    """Fit d log(mean) / d log(T)."""
    return float(np.polyfit(np.log(horizons), np.log(means), 1)[0])


@dataclass
class Measured:
    """What the runs of all horizons show.

    Attributes:
        rates: of each norm, the mean over a run's steps, a value per horizon.
        drift: mean |U_t - U_f|, a value per horizon.
        floor: smallest g'U_t g / (u_min |g|^2); 1 or more by definition of u_min.
        excess: largest left minus right side of the inequality for U_f, of all steps.
        average_excess: the same, of the means over a run.
        change: the smallest of the runs' largest |Ug - g| / |g|: whether U acts at all.
    """

    rates: dict[str, list[float]]
    drift: list[float]
    floor: float = np.inf
    excess: float = -np.inf
    average_excess: float = -np.inf
    change: float = np.inf

    def add_run(self, one: Run) -> None:
        """Take a run into the extremes."""
        exact = one.in_metric(one.metrics)
        final = one.in_metric(one.metrics[-1])
        squares = one.gradients.square().sum(-1)
        lowest = torch.linalg.eigvalsh(one.metrics)[:, 0]
        self.floor = min(self.floor, float((exact / (lowest * squares)).min()))
        bound = float(squares.max()) * one.discrepancy
        self.excess = max(self.excess, float(((exact - final).abs() - bound).max()))
        means = float(final.mean() - exact.mean() - bound.mean())
        self.average_excess = max(self.average_excess, means)
        self.change = min(self.change, one.change)


def measure_runs(horizons: Sequence[int]) -> Measured:
    """Train runs of every length."""
    found = Measured({"U_t": [], "Euclidean": [], "U_f": []}, [])
    for steps in horizons:
        # Short runs are cheap and noisy: average over more of them.
        seeds = range(max(1, min(4, 2**10 // steps * 2)))
        runs = [train_run(steps, seed) for seed in seeds]
        for one in runs:
            found.add_run(one)
        for name, values in found.rates.items():
            values.append(float(np.mean([mean_of(name, one) for one in runs])))
        found.drift.append(float(np.mean([float(one.discrepancy.mean()) for one in runs])))
    return found


def check_transfer(horizons: tuple[int, ...] = HORIZONS) -> list[Finding]:
    """Check the rate in U_t, in the Euclidean norm and in U_f, and the two inequalities."""
    found = measure_runs(horizons)
    rates, drift = found.rates, found.drift
    slopes = {name: fitted_slope(list(horizons), values) for name, values in rates.items()}
    by_horizon = {f"mean g'Ug at T = {t}": v for t, v in zip(horizons, rates["U_t"], strict=True)}
    return [
        Finding(
            "Proposition B.1",
            "mean of g'U_t g is O(T^-1/2)",
            HOLDS,
            slopes["U_t"] <= -0.4 and found.change > 0.1,
            {
                "fitted slope": slopes["U_t"],
                **by_horizon,
                "smallest of the largest changes": found.change,
            },
            "Logistic regression with flipped labels, dense U learned by 16 refreshes a run.",
            {
                "steps T": list(horizons),
                "measured mean of g'U_t g": rates["U_t"],
                "measured mean of |g|^2": rates["Euclidean"],
                "T^(-1/2), through the first": [
                    rates["U_t"][0] * (horizons[0] / t) ** 0.5 for t in horizons
                ],
            },
            {
                "title": r"longer runs end flatter: the mean of $g^\top U_t\, g$ is $O(T^{-1/2})$",
                "y": "mean over the run",
                "steps T": "steps $T$",
                "measured mean of g'U_t g": r"measured, $g^\top U_t\, g$",
                "measured mean of |g|^2": r"measured, $|g|^2$",
                "T^(-1/2), through the first": r"$T^{-1/2}$, through the first",
            },
        ),
        Finding(
            "Proposition B.1",
            "mean of |g|^2 is O(T^-1/2), since g'U_t g >= u_min |g|^2",
            HOLDS,
            slopes["Euclidean"] <= -0.4 and found.floor >= 1 - 1e-9,
            {"fitted slope": slopes["Euclidean"], "smallest g'U_t g / (u_min |g|^2)": found.floor},
            "u_min is U_t's own smallest eigenvalue.",
        ),
        Finding(
            "Proposition B.1",
            "in the last metric U_f: up to G^2 mean |U_t - U_f|",
            LIMITS,
            found.excess <= 1e-12 and found.average_excess <= 1e-12 and slopes["U_f"] <= -0.4,
            {
                "largest left minus right, every step": found.excess,
                "the same of the means": found.average_excess,
                "fitted slope of g'U_f g": slopes["U_f"],
                "mean |U_t - U_f| at the smallest T": drift[0],
                "mean |U_t - U_f| at the largest T": drift[-1],
            },
            "The inequality holds. With refreshes at fixed fractions of the run its second term "
            "does not vanish with T, so it does not give the rate in U_f, though that is measured.",
        ),
    ]


def mean_of(name: str, one: Run) -> float:
    """Return the mean over a run of g'U_t g, |g|^2 or g'U_f g."""
    if name == "Euclidean":
        return float(one.gradients.square().sum(-1).mean())
    return float(one.in_metric(one.metrics if name == "U_t" else one.metrics[-1]).mean())
