"""What each setting of NaturalGradient and LLQR does to training, at equal steps.

    python benchmarks/ablation.py [--only NAME;NAME] [--seeds 3] [--workers 2] [--out FILE]
    python benchmarks/ablation.py --page FILE     write the table of FILE into docs/closed-form.md

A CNN with BatchNorm on Fashion-MNIST at 14 x 14 (12,000 images, batches of 128), 470 steps at a
constant learning rate; "wide" rows are an MLP 784-256-64-10 on the whole images. Each method's
learning rate is chosen on a seed that is not among those of the table. Numbers are the training
loss at the end, in evaluation mode over all images, mean +- standard deviation; the seconds are
those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from llqr.geometry.structures.closed_form import OneSided
from llqr_lab.common.pages import fill_between
from llqr_lab.data.fashion_mnist import fashion_mnist

STEPS, BATCH, IMAGES = 470, 128, 12_000
TUNING_SEEDS = (100,)
RATES = {
    "SGD": (0.05, 0.1, 0.2),
    "SGD with U": (0.05, 0.1),
    "AdamW": (1e-3, 3e-3, 1e-2),
    "SOAP": (1e-3, 3e-3, 1e-2),
}
growing = llqr.growing

PAGE = Path(__file__).parents[1] / "docs" / "closed-form.md"
RESULTS = Path(__file__).parent / "results" / "ablation.json"
#: Titles of the tables that stand below the first one.
SETS = {
    "cadence": "Cadences of NaturalGradient side by side, all at lr .05 "
    "(`growing(10, 500, rate=3)` is the default now, the other tables have `growing(5, 500)`):",
    "wide": "Wide sides, an MLP 784-256-64-10 on whole images (the machine had much other work):",
    "earlier": "With bases renewed at every refresh, in exact eigenvectors (`defaults` differ in "
    "that):",
}
BEGIN, END = "<!-- table of benchmarks/ablation.py -->", "<!-- end of the table -->"

#: name: (base, geometry or None); the base's rate is chosen from RATES.
METHODS: dict[str, tuple[str, Callable[[], llqr.Geometry] | None]] = {
    "SGDM": ("SGD", None),
    "AdamW": ("AdamW", None),
    "SOAP": ("SOAP", None),
}


def one_sided_above_512(name: str, parameter: Tensor) -> Any:
    """Return the structure of a parameter: one-sided if a side is wide."""
    return OneSided if max(parameter.shape) > 512 else "e-kfac"


def closed(**settings: Any) -> tuple[str, Callable[[], llqr.Geometry]]:
    """NaturalGradient under SGDM with graft."""
    return "SGD with U", partial(llqr.NaturalGradient, **settings)


def learned(**settings: Any) -> tuple[str, Callable[[], llqr.Geometry]]:
    """LLQR under SGDM with graft."""
    return "SGD with U", partial(llqr.LLQR, **settings)


METHODS |= {
    "defaults": closed(),
    **{f"damping {d}": closed(damping=d) for d in (0.003, 0.01, 0.1, 1.0)},
    **{f"samples {m}": closed(samples=m) for m in (2, 4, 16)},
    **{f"ema {b}": closed(ema=b) for b in (0.0, 0.5, 0.95)},
    "every 50": closed(every=50),
    "every 20": closed(every=20),
    "growing(10, 500)": closed(every=growing(10, 500)),
    "growing(5, 500)": closed(every=growing(5, 500)),
    "kfac, growing(5, 500)": closed(structure="kfac", every=growing(5, 500)),
    "power 0.5": closed(power=0.5),
    "power 0.75": closed(power=0.75),
    "kfac": closed(structure="kfac"),
    "kfac, damping 0.01": closed(structure="kfac", damping=0.01),
    "diagonal": closed(structure="diagonal"),
    "diagonal, power 0.5": closed(structure="diagonal", power=0.5),
    "dense, runs of 256": closed(structure="dense", block_size=256),
    "running statistics": closed(batch_norm="running"),
    "sides of 128": closed(block_size=128),
    **{
        f"gradients, power {p}, ema {b}": closed(second_moment="gradients", power=p, gradient_ema=b)
        for p in (0.5, 0.75, 1.0)
        for b in (0.95,)
    },
    "gradients, power 1.0, ema 0.95, damping 0.01": closed(second_moment="gradients", damping=0.01),
    "renew_every 1": closed(renew_every=1),
    "renew_every 4": closed(renew_every=4),
    "wide: SGDM": ("SGD", None),
    "wide: whole": closed(block_size=None),
    "wide: blocks of 512": closed(),
    "wide: blocks of 256": closed(block_size=256),
    "wide: one-sided first layer": closed(structure=one_sided_above_512, block_size=None),
    "wide: one-sided": closed(structure=OneSided, block_size=None),
    "LLQR defaults": learned(),
    "LLQR kfac": learned(structure="kfac"),
    "LLQR e-kfac": learned(structure="e-kfac"),
    "LLQR diagonal": learned(structure="diagonal"),
    "LLQR kfac, running": learned(structure="kfac", batch_norm="running"),
    "LLQR kfac, lr 0.01": learned(structure="kfac", lr=1e-2),
}


def network(name: str = "") -> nn.Sequential:
    """A CNN with batch norm of 23,994 parameters, or the wide MLP."""
    if name.startswith("wide"):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@cache
def images(pooling: int) -> tuple[Tensor, Tensor]:
    """Return 12,000 images of Fashion-MNIST, averaged over squares of pixels, and their labels."""
    prepared = os.environ.get("ABLATION_DATA")
    if prepared:
        x, y = torch.load(prepared)
    else:
        train = fashion_mnist().train
        x, y = train.pixels[:IMAGES, 0], train.labels[:IMAGES]
    x = F.avg_pool2d(x.float()[:, None] / 255, pooling)
    return (x - x.mean()) / x.std(), y.long()


def batches(seed: int) -> Iterator[Tensor]:
    """Yield the indices of batches, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(IMAGES, generator=generator).split(BATCH)[: IMAGES // BATCH]


def base_of(kind: str, model: nn.Module, lr: float) -> Any:
    """Return a base optimizer."""
    parameters = list(model.parameters())
    if kind.startswith("SGD"):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    if kind == "AdamW":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    if kind == "SOAP":
        from pytorch_optimizer import SOAP

        return SOAP(parameters, lr=lr, weight_decay=0.01, precondition_frequency=10)
    raise ValueError(kind)


def run(name: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return the training loss, seconds and what the refreshes reported."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    kind, make = METHODS[name]
    model, (x, y) = network(name), images(1 if name.startswith("wide") else 2)
    geometry = None if make is None else make()
    base = base_of(kind, model, lr)
    optimizer = llqr.Optimizer(base, model, geometry=geometry, graft=geometry is not None)
    reports: list[llqr.RefreshReport] = []
    optimizer.register_refresh_hook(lambda _, report: reports.append(report))
    began = time.process_time()
    for _, rows in zip(range(STEPS), batches(seed), strict=False):
        xs, ys = x[rows], y[rows]
        optimizer.minimize(lambda xs=xs, ys=ys: (F.cross_entropy(z := model(xs), ys), z))
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    products = [r.products for r in reports if r.products is not None]
    return {
        "loss": loss,
        "seconds": seconds,
        "refreshes": len(reports),
        "accepted": sum(r.accepted for r in reports),
        "products": statistics.median(products) if products else None,
        "refresh_seconds": sum(r.seconds or 0.0 for r in reports),
        "change": reports[-1].change if reports else None,
    }


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean +- standard deviation"."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} +- {spread:.3f}"


def study(names: list[str], seeds: int, workers: int) -> dict[str, Any]:
    """Tune each method's rate, then run the seeds of the table."""
    rates = {name: RATES[METHODS[name][0]] for name in names}
    tasks = [(name, lr, seed) for name in names for lr in rates[name] for seed in TUNING_SEEDS]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        tuned = list(zip(tasks, pool.map(run, *zip(*tasks, strict=True)), strict=True))
        losses: dict[tuple[str, float], float] = defaultdict(float)
        for (name, lr, _), result in tuned:
            losses[name, lr] += result["loss"]
        best = {name: min(rates[name], key=lambda lr: losses[name, lr]) for name in names}  # noqa: B023
        fresh = [(name, best[name], seed) for name in names for seed in range(seeds)]
        runs = list(zip(fresh, pool.map(run, *zip(*fresh, strict=True)), strict=True))
    return {
        name: {"lr": best[name], "runs": [r for (other, _, _), r in runs if other == name]}
        for name in names
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| | lr | training loss | seconds | refreshes | accepted | products | change |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        runs = result["runs"]
        loss = mean_and_deviation([r["loss"] for r in runs])
        seconds = statistics.mean(r["seconds"] for r in runs)
        first = runs[0]
        rest = ["", "", "", ""]
        if first["refreshes"]:
            accepted = sum(r["accepted"] for r in runs) / sum(r["refreshes"] for r in runs)
            products = "" if first["products"] is None else f"{first['products']:g}"
            rest = [str(first["refreshes"]), f"{accepted:.0%}", products, f"{first['change']:.2f}"]
        lines.append(f"| {name} | {result['lr']:g} | {loss} | {seconds:.1f} | {' | '.join(rest)} |")
    return "\n".join(lines)


def write_page(file: Path) -> None:
    """Keep the results of a file and write their table into the page."""
    if file.resolve() != RESULTS:
        RESULTS.write_text(file.read_text())
    PAGE.write_text(fill_between(PAGE.read_text(), BEGIN, END, section()))


def section() -> str:
    """Return what the page shows of the kept results."""
    kept = json.loads(RESULTS.read_text())
    below = [f"{title}\n\n{table(kept[name])}" for name, title in SETS.items() if name in kept]
    return "\n\n".join([table(kept["results"]), *below])


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="methods, separated by semicolons; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--page", type=Path, help="JSON file whose table goes into the page")
    options = parser.parse_args()
    if options.page:
        return write_page(options.page)
    names = list(METHODS) if options.only is None else options.only.split(";")
    results = study(names, options.seeds, options.workers)
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
