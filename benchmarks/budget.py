"""SAM on a budget: SGDM, SAM and its cheap relatives at equal time on Fashion-MNIST.

    python benchmarks/budget.py [--seeds 5] [--workers 14] [--budget 6] [--out FILE]
    python benchmarks/budget.py --page FILE       write the tables of FILE into the page
    python benchmarks/budget.py --prepare FILE    write the data, for BUDGET_DATA=FILE elsewhere

A small CNN with batch norm (14 x 14 pixels, 2,000 images, batches of 128), with the right labels
and with 30 % wrong ones. Each method takes as many steps as fit into the budget, in seconds of one
processor, at the seconds per step that all methods showed side by side. All have nine settings to
choose from, by the validation accuracy of two seeds that are not among those of the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablation import network
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from llqr_lab.common.environment import processor_name
from llqr_lab.common.pages import fill_between
from llqr_lab.data.fashion_mnist import fashion_mnist

POOL, IMAGES, VALIDATION, BATCH = 8_000, 2_000, 4_000, 128
TUNING_SEEDS = (100, 101)
NOISES = (0.0, 0.3)
RATES, RADII = (0.03, 0.1, 0.3), (0.01, 0.03, 0.1)
MOMENTUM_RADII = (0.1, 0.3, 1.0)  # the momentum is far from the steepest ascent
ALONE = (0.01, 0.02, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.6)

#: name: (perturbation or None, its radii); rates are RATES, and ALONE where there is no radius.
METHODS: dict[str, tuple[Callable[[float], llqr.Perturbation] | None, tuple[float, ...]]] = {
    "SGDM": (None, ()),
    "SAM": (llqr.SAM, RADII),
    "SAM(interval=5)": (partial(llqr.SAM, interval=5), RADII),
    "LookSAM(interval=5)": (partial(llqr.LookSAM, interval=5), RADII),
    "MSAM": (llqr.MSAM, MOMENTUM_RADII),
    "ESAM": (llqr.ESAM, RADII),
    "GSAM": (llqr.GSAM, RADII),
}

PAGE = Path(__file__).parents[1] / "docs" / "sam-on-a-budget.md"
RESULTS = Path(__file__).parent / "results" / "budget.json"
BEGIN, END = "<!-- tables of benchmarks/budget.py -->", "<!-- end of the tables -->"


class Setting(NamedTuple):
    """A method with its tuned numbers, on data with a share of wrong labels."""

    noise: float
    method: str
    lr: float
    rho: float | None


def settings_of(noise: float, method: str) -> list[Setting]:
    """Return the nine settings a method chooses from."""
    radii = METHODS[method][1]
    if not radii:
        return [Setting(noise, method, lr, None) for lr in ALONE]
    return [Setting(noise, method, lr, rho) for lr, rho in product(RATES, radii)]


def raw_data() -> dict[str, tuple[Tensor, Tensor]]:
    """Return 12,000 training and 10,000 test images, (n, 28, 28) in uint8, with their labels."""
    if prepared := os.environ.get("BUDGET_DATA"):
        return torch.load(prepared)  # type: ignore[no-any-return]
    split = fashion_mnist()
    train, test = split.train, split.test
    n = POOL + VALIDATION
    return {
        "train": (train.pixels[:n, 0].clone(), train.labels[:n].clone()),
        "test": (test.pixels[:, 0].clone(), test.labels.clone()),
    }


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Return the images at 14 x 14, standardised by those to train on, as pool, validation, test.

    Labels of validation and test images are never replaced by wrong ones.
    """
    raw = raw_data()
    small = {part: F.avg_pool2d(x.float()[:, None] / 255, 2) for part, (x, _) in raw.items()}
    mean, std = small["train"][:POOL].mean(), small["train"][:POOL].std()
    (x, y), (x_test, y_test) = (
        ((small[part] - mean) / std, raw[part][1].long()) for part in ("train", "test")
    )
    cut, end = POOL, POOL + VALIDATION
    return {
        "pool": (x[:cut], y[:cut]),
        "validation": (x[cut:end], y[cut:end]),
        "test": (x_test, y_test),
    }


def training_images(noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the images of a seed; a share of the labels becomes one of the nine others."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data()["pool"]
    rows = torch.randperm(POOL, generator=generator)[:IMAGES]
    x, y = x[rows], y[rows]
    others = torch.randint(1, 10, (IMAGES,), generator=generator)
    wrong = torch.rand(IMAGES, generator=generator) < noise
    return x, torch.where(wrong, (y + others) % 10, y)


def batches(seed: int) -> Iterator[Tensor]:
    """Yield the indices of batches, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(IMAGES, generator=generator).split(BATCH)[: IMAGES // BATCH]


class Training:
    """A network under a method, one step at a time; SGDM is torch's own, without the library."""

    def __init__(self, setting: Setting, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = network()
        self.images, self.labels = training_images(setting.noise, seed)
        self._rows = batches(seed)
        self._base = torch.optim.SGD(
            self.model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=5e-4
        )
        make = METHODS[setting.method][0]
        self._optimizer = None
        if make is not None:
            assert setting.rho is not None
            perturbation = make(setting.rho)
            self._optimizer = llqr.Optimizer(self._base, self.model, perturbation=perturbation)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._base, steps)

    def step(self) -> None:
        """Take one step."""
        rows = next(self._rows)
        x, y = self.images[rows], self.labels[rows]
        if self._optimizer is None:
            self._base.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self._base.step()
        else:
            self._optimizer.minimize(lambda: F.cross_entropy(self.model(x), y))
        self._schedule.step()


def prepare_worker() -> None:
    """One thread per process, and no warnings of runs that diverge while they are tuned."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def seconds_per_step(rounds: int) -> dict[str, float]:
    """Time ten steps of each method in turns; return medians of the seconds per step."""
    prepare_worker()
    steps = 10  # two periods of the methods that probe every fifth step
    trainings = {m: Training(settings_of(0.0, m)[0], 0, steps * (rounds + 1)) for m in METHODS}
    times: dict[str, list[float]] = {m: [] for m in METHODS}
    for i in range(rounds + 1):
        for method, training in trainings.items():
            began = time.process_time()
            for _ in range(steps):
                training.step()
            if i > 0:
                times[method].append((time.process_time() - began) / steps)
    return {method: statistics.median(t) for method, t in times.items()}


@torch.no_grad()
def accuracy(model: nn.Module, part: str) -> float:
    """Return the share of images that are classified rightly, in percent."""
    x, y = data()[part]
    pieces = zip(x.split(500), y.split(500), strict=True)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in pieces)
    return 100 * right / len(y)


def run(setting: Setting, seed: int, steps: int, part: str) -> dict[str, Any]:
    """Train once; return the accuracy on validation or test images, and the seconds."""
    prepare_worker()
    training = Training(setting, seed, steps)
    began = time.process_time()
    for _ in range(steps):
        training.step()
    seconds = time.process_time() - began
    training.model.eval()
    return {"seed": seed, "accuracy": accuracy(training.model, part), "seconds": seconds}


def study(seeds: int, workers: int, budget: float, rounds: int) -> dict[str, Any]:
    """Measure what steps cost, tune all methods alike, and run the seeds of the tables."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        # All processes at once, as in the runs: neighbours cost time too.
        measured = list(pool.map(seconds_per_step, [rounds] * workers))
        costs = {m: statistics.median(c[m] for c in measured) for m in METHODS}
        steps = {m: max(1, math.floor(budget / cost)) for m, cost in costs.items()}
        for method in METHODS:
            print(f"{method}: {1e3 * costs[method]:.2f} ms per step, {steps[method]} steps")

        def run_all(tasks: list[tuple[Setting, int]], part: str) -> dict[Setting, list[Any]]:
            futures = [(s, pool.submit(run, s, seed, steps[s.method], part)) for s, seed in tasks]
            found: dict[Setting, list[Any]] = {}
            for setting, future in futures:
                found.setdefault(setting, []).append(future.result())
            return found

        rows = list(product(NOISES, METHODS))
        candidates = [s for noise, method in rows for s in settings_of(noise, method)]
        tuned = run_all(list(product(candidates, TUNING_SEEDS)), "validation")
        best = [max(settings_of(*row), key=lambda s: _mean_accuracy(tuned[s])) for row in rows]
        final = run_all(list(product(best, range(seeds))), "test")
    return {
        "budget": budget,
        "seeds": seeds,
        "workers": workers,
        "torch": torch.__version__,
        "llqr": llqr.__version__,
        "processor": processor_name(),
        "seconds per step": costs,
        "steps": steps,
        "rows": [{**s._asdict(), "runs": final[s]} for s in best],
        "tuning": [{**s._asdict(), "runs": runs} for s, runs in tuned.items()],
    }


def _mean_accuracy(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(r["accuracy"] for r in runs)


def tables(results: dict[str, Any]) -> str:
    """Return the costs and the accuracies as Markdown, with what can be told from SAM."""
    seeds = results["seeds"]
    lines = [
        f"{results['budget']:g} seconds per run, {seeds} seeds, {results['workers']} processes of "
        f"one thread on {results['processor']}; torch {results['torch']}.",
    ]
    for noise in NOISES:
        rows = {r["method"]: r for r in results["rows"] if r["noise"] == noise}
        labels = f"{noise:.0%} wrong labels".replace("%", " %") if noise else "the right labels"
        lines += [
            "",
            f"With {labels}:",
            "",
            "| method | ms per step | steps | lr | rho | test accuracy, % | minus SAM |",
            "|---|---|---|---|---|---|---|",
        ]
        for method, row in rows.items():
            accuracies = [r["accuracy"] for r in row["runs"]]
            cells = [
                method,
                f"{1e3 * results['seconds per step'][method]:.1f}",
                str(results["steps"][method]),
                _marked(row["lr"], ALONE if row["rho"] is None else RATES),
                "" if row["rho"] is None else _marked(row["rho"], METHODS[method][1]),
                f"{statistics.mean(accuracies):.2f} +- {_deviation(accuracies):.2f}",
                "" if method == "SAM" else "{:+.2f} +- {:.2f}".format(*_minus_sam(rows, method)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", _verdict(rows)]
    return "\n".join(lines)


def _marked(value: float, values: tuple[float, ...]) -> str:
    """Return the number, with a mark if it is the first or last of those tried."""
    return f"{value:g}" + (" (end)" if value in (min(values), max(values)) else "")


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _minus_sam(rows: dict[str, Any], method: str) -> tuple[float, float]:
    """Return the mean difference to SAM at the same seed, and its standard error."""
    pairs = zip(rows[method]["runs"], rows["SAM"]["runs"], strict=True)
    differences = [a["accuracy"] - b["accuracy"] for a, b in pairs]
    return statistics.mean(differences), _deviation(differences) / math.sqrt(len(differences))


def _verdict(rows: dict[str, Any]) -> str:
    """Say which methods differ from SAM by more than three standard errors."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for method in rows:
        difference, error = _minus_sam(rows, method)
        if abs(difference) > 3 * error:
            found["better" if difference > 0 else "worse"].append(method)
    said = [f"{', '.join(names)} {kind} than SAM" for kind, names in found.items() if names]
    return f"By more than three standard errors: {'; '.join(said) or 'none differs from SAM'}."


def section(path: Path = RESULTS) -> str:
    """Return what stands between the two comments of the page."""
    if not path.exists():
        return "The study has not been run yet."
    return tables(json.loads(path.read_text()))


def write_page(path: Path) -> None:
    """Put the tables of a JSON file into the page."""
    PAGE.write_text(fill_between(PAGE.read_text(), BEGIN, END, section(path)))


def main() -> None:
    """Run the study and print its tables, or only write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of a run's training")
    parser.add_argument("--rounds", type=int, default=8, help="of ten steps, to measure costs")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--page", type=Path, help="JSON file whose tables go into the page")
    parser.add_argument("--prepare", type=Path, help="file to write the data to")
    options = parser.parse_args()
    if options.page:
        write_page(options.page)
    elif options.prepare:
        torch.save(raw_data(), options.prepare)
    else:
        results = study(options.seeds, options.workers, options.budget, options.rounds)
        print("\n" + tables(results))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
