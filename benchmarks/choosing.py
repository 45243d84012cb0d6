"""Try the rules of docs/how-to-choose.md on four small networks.

    python benchmarks/choosing.py [--only cnn,vit] [--steps 100] [--seeds 2] [--workers 2] [--out F]
    python benchmarks/choosing.py --page      write the tables of F into the page

A BatchNorm CNN, a ResNet of width 16 and a small vision transformer on 12,000 images of
Fashion-MNIST at 14 x 14, and a translation model on LibreOffice's help. Every method makes the same
number of steps at a constant learning rate, chosen from two after 40 steps on a seed that is not in
the table.
So short a training says how fast the loss falls at first, not what a method comes to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablation import images, network
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from llqr_lab.common.pages import fill_between
from llqr_lab.data.fashion_mnist import fashion_mnist
from llqr_lab.data.libreoffice import libreoffice_help
from llqr_lab.data.token_batches import Sentences, TokenBatch, token_batches
from llqr_lab.data.tokens import PAD
from llqr_lab.data.vocabulary import Bpe
from llqr_lab.models.resnet import resnet18
from llqr_lab.models.translation import translation_model
from llqr_lab.models.vit import vit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "choosing.json"
PAGE = ROOT / "docs" / "how-to-choose.md"
BEGIN, END = "<!-- tables of benchmarks/choosing.py -->", "<!-- end of the tables -->"
TUNING_SEED = 100
RATES = {"SGD": (0.05, 0.2), "AdamW": (1e-3, 4e-3)}
TUNING_STEPS = 40
BATCH, TOKENS, VOCABULARY, PAIRS = 64, 600, 1000, 8000
natural = llqr.NaturalGradient


class Method(NamedTuple):
    """A base, a geometry and a perturbation."""

    base: str = "SGD"
    geometry: Callable[[], llqr.Geometry] | None = None
    perturbation: Callable[[], llqr.Perturbation] | None = None


METHODS: dict[str, Method] = {
    "SGDM": Method(),
    "AdamW": Method("AdamW"),
    "NaturalGradient e-kfac": Method(geometry=natural),
    "NaturalGradient diagonal": Method(geometry=partial(natural, "diagonal")),
    "NaturalGradient e-kfac on AdamW": Method("AdamW", natural),
    "NaturalGradient e-kfac, every=500": Method(geometry=partial(natural, every=500)),
    "LLQR kfac": Method(geometry=partial(llqr.LLQR, "kfac")),
    "SGDM + SAM": Method(perturbation=partial(llqr.SAM, 0.05)),
    "NaturalGradient e-kfac + SAM, along gradient": Method(
        geometry=natural, perturbation=partial(llqr.SAM, 0.05, along="gradient")
    ),
}  # fmt: skip


class Problem(NamedTuple):
    """A network, its batches, and its loss on a batch as (loss, outputs)."""

    model: nn.Module
    batches: Iterator[Any]
    loss: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    held_out: list[Any]


# -- the four problems -----------------------------------------------------------------------------


@cache
def held_out_images() -> tuple[Tensor, Tensor]:
    """Return 2,000 test images at 14 x 14, and their labels."""
    test = fashion_mnist().test
    x = F.avg_pool2d(test.pixels[:2000].float() / 255, 2)
    return (x - x.mean()) / x.std(), test.labels[:2000].long()


def image_batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of 64, each epoch in another order."""
    x, y = images(2)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(BATCH)[:-1]:
            yield x[rows], y[rows]


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and logits."""
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]), logits


@cache
def sentences() -> tuple[Sentences, Sentences]:
    """Return 8,000 pairs to train on and 300 to validate, of at most 60 tokens."""
    pairs = libreoffice_help()
    bpe = Bpe.learn(chain.from_iterable(pairs.train[:PAIRS]), VOCABULARY)
    parts = []
    for part, count in ((pairs.train, PAIRS), (pairs.valid, 300)):
        short = [p for p in part if max(len(bpe.encode(s)) for s in p) <= 60]
        parts.append(Sentences(short[:count], bpe, bpe))
    return parts[0], parts[1]


def text_batches(seed: int) -> Iterator[TokenBatch]:
    """Yield batches of at most 600 tokens."""
    generator, (train, _) = torch.Generator().manual_seed(seed), sentences()
    while True:
        for chosen in token_batches(train.lengths(), TOKENS, generator):
            yield train.batch(chosen)


def text_loss(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy per token, and the logits."""
    logits = model(batch.source, batch.prefix)
    return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD), logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": partial(network, "cnn"),
    "resnet": lambda: resnet18(10, channels=1, width=16, blocks=(1, 1, 1)),
    "vit": lambda: vit(10, width=32, depth=2, heads=2, patch=2, image=14, channels=1),
    "translation": lambda: translation_model(
        VOCABULARY, source=VOCABULARY, width=64, hidden=128, heads=2, layers=2, dropout=0.1
    ),
}


def problem_of(name: str, seed: int) -> Problem:
    """Return a problem with the network of a seed."""
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    if name == "translation":
        valid = sentences()[1]
        batches = [valid.batch(chosen) for chosen in token_batches(valid.lengths(), TOKENS)]
        return Problem(model, text_batches(seed), text_loss, batches)
    x, y = held_out_images()
    pieces = list(zip(x.split(500), y.split(500), strict=True))
    return Problem(model, image_batches(seed), image_loss, pieces)


# -- training --------------------------------------------------------------------------------------


def optimizer_of(method: Method, model: nn.Module, lr: float) -> llqr.Optimizer[Any]:
    """Return the optimizer of a method."""
    if method.base == "SGD":
        base: Any = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    else:
        base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    make, probe = method.geometry, method.perturbation
    return llqr.Optimizer(
        base,
        model,
        geometry=make and make(),
        perturbation=probe and probe(),
        graft=make is not None,
    )


def train(problem: Problem, optimizer: llqr.Optimizer[Any], steps: int) -> list[float]:
    """Make the steps; return their losses."""
    losses = []
    for _, batch in zip(range(steps), problem.batches, strict=False):
        losses.append(float(optimizer.minimize(lambda b=batch: problem.loss(problem.model, b))))
    return losses


def run(name: str, method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return losses, seconds and what the last refresh reported."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = problem_of(name, seed)
    optimizer = optimizer_of(METHODS[method], problem.model, lr)
    counts = [0, 0]

    def count(_: Any, report: llqr.RefreshReport) -> None:
        counts[0] += 1
        counts[1] += report.accepted

    optimizer.register_refresh_hook(count)
    began = time.process_time()
    losses = train(problem, optimizer, steps)
    seconds = time.process_time() - began
    problem.model.eval()
    with torch.no_grad():
        held = [float(problem.loss(problem.model, b)[0]) for b in problem.held_out]
    report = optimizer.last_report
    last = losses[-20:]
    return {
        "loss": round(statistics.mean(last), 4),  # of the last 20 batches, before their steps
        "held_out": round(statistics.mean(held), 4),
        "seconds": round(seconds, 2),
        "refreshes": counts[0],
        "accepted": counts[1],
        "change": None if report is None or report.change is None else round(report.change, 3),
    }


def radii(name: str, steps: int) -> dict[str, Any]:
    """Return what find_rho says after half and all of the steps, of both ways to probe."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = problem_of(name, 0)
    method = METHODS["NaturalGradient e-kfac"]
    optimizer = optimizer_of(method, problem.model, 0.1)
    found: dict[str, Any] = {}
    for at in (steps // 2, steps):
        train(problem, optimizer, steps // 2)
        some = [batch for _, batch in zip(range(4), problem.batches, strict=False)]
        for along in ("gradient", "metric"):
            probed = llqr.Optimizer(
                torch.optim.SGD(problem.model.parameters(), lr=0.1),
                problem.model,
                geometry=_fixed_copy(optimizer.geometry),
                perturbation=llqr.SAM(0.05, along=along),
            )
            table = llqr.find_rho(probed, lambda b: problem.loss(problem.model, b), batches=some)
            found[f"{along} at {at}"] = {
                "loss": round(table.loss, 4),
                "low": table.low,
                "high": table.high,
                "rows": [[r.rho, round(r.rise, 5), round(r.ratio, 3)] for r in table.rows],
            }
    return found


def _fixed_copy(geometry: llqr.Geometry) -> llqr.Geometry:
    """Return a metric that applies another's U and never learns."""

    class Applied(llqr.Geometry):
        def apply(self, gradients: Any) -> dict[str, Tensor]:
            return geometry.apply(gradients)

    return Applied()


def inner_rates(name: str, steps: int) -> list[dict[str, Any]]:
    """Return what find_inner_lr says of LLQR with kfac after some steps of SGDM."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = problem_of(name, 0)
    optimizer = optimizer_of(METHODS["SGDM"], problem.model, 0.05)
    train(problem, optimizer, steps)
    geometry = llqr.LLQR("kfac")
    geometry.bind(problem.model)
    some = [batch for _, batch in zip(range(4), problem.batches, strict=False)]
    table = llqr.find_inner_lr(geometry, lambda b: problem.loss(problem.model, b), batches=some)
    keys = ("lr", "reason", "change", "gain", "held_out", "standard_error", "products")
    rows = ({key: getattr(row, key) for key in keys} for row in table.rows)
    return [
        {k: round(v, 3) if isinstance(v, float) and k != "lr" else v for k, v in row.items()}
        for row in rows
    ]


def study(
    name: str, names: list[str], steps: int, seeds: int, pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """Tune each method's rate, then run the seeds of the table."""
    found, rates = pool.submit(radii, name, steps), pool.submit(inner_rates, name, steps)
    tuning = [(m, lr) for m in names for lr in RATES[METHODS[m].base]]
    tuned = [(m, lr, pool.submit(run, name, m, lr, TUNING_SEED, TUNING_STEPS)) for m, lr in tuning]
    results: dict[str, list[tuple[float, float]]] = {}
    for m, lr, future in tuned:
        loss = future.result()["loss"]
        results.setdefault(m, []).append((loss if loss == loss else float("inf"), lr))
    best = {m: min(pairs)[1] for m, pairs in results.items()}
    fresh = [
        (m, [pool.submit(run, name, m, best[m], s, steps) for s in range(seeds)]) for m in best
    ]
    methods = {m: {"lr": best[m], "runs": [f.result() for f in runs]} for m, runs in fresh}
    return {"methods": methods, "radii": found.result(), "inner_rates": rates.result()}


# -- the page --------------------------------------------------------------------------------------


def section(data: dict[str, Any]) -> str:
    """Return what stands between the two comments of the page."""
    problems = data["problems"]
    sizes = ", ".join(f"{name} {p['steps']} steps" for name, p in problems.items())
    lines = [
        f"Training loss (mean of the last 20 batches) of each of two seeds, and in brackets the "
        f"processor time as a multiple of SGDM's ({sizes}; torch {data['torch']}):",
        "",
        _row("", *problems),
        "|---|" + "---|" * len(problems),
    ]
    lines += [
        _row(m, *(_loss_cell(p, m, "loss", time=True) for p in problems.values())) for m in METHODS
    ]
    lines += ["", "Loss on held-out data in evaluation mode:", "", _row("", *problems)]
    lines += ["|---|" + "---|" * len(problems)]
    lines += [_row(m, *(_loss_cell(p, m, "held_out") for p in problems.values())) for m in METHODS]
    lines += [
        "",
        "What `find_rho` says to try with `NaturalGradient`, and how many times as large `rho` "
        'must be with `along="metric"` for the same rise:',
        "",
        _row("", "after steps", "loss", "along gradient", "along metric", "times"),
        "|---|---|---|---|---|---|",
    ]
    for name, problem in problems.items():
        found = problem["radii"]
        for at in (problem["steps"] // 2, problem["steps"]):
            plain, metric = found[f"gradient at {at}"], found[f"metric at {at}"]
            # Both are linear in rho at the smallest one.
            times = plain["rows"][0][1] / metric["rows"][0][1]
            cells = (f"{plain['loss']:.3g}", _range(plain), _range(metric), f"{times:.2g}")
            lines.append(_row(name, str(at), *cells))
    return "\n".join([*lines, *_inner_rate_lines(problems)])


def _inner_rate_lines(problems: dict[str, Any]) -> list[str]:
    """Return the table of find_inner_lr: how good U is on other batches, at each rate."""
    measured = {name: p["inner_rates"] for name, p in problems.items() if "inner_rates" in p}
    if not measured:
        return []
    rates = [str(row["lr"]) for row in next(iter(measured.values()))]
    lines = [
        "",
        'What `find_inner_lr` says of `LLQR("kfac")` after as many steps of SGDM: the gain on the '
        "refresh batch and, after the arrow, on other batches:",
        "",
        _row("", *(f"lr {rate}" for rate in rates)),
        "|---|" + "---|" * len(rates),
    ]
    for name, rows in measured.items():
        cells = [
            "refused" if r["reason"] else f"{r['gain']:.2f} → {r['held_out']:.2f}" for r in rows
        ]
        lines.append(_row(name, *cells))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _loss_cell(problem: dict[str, Any], method: str, key: str, time: bool = False) -> str:
    if method not in problem["methods"]:
        return ""
    runs, plain = problem["methods"][method]["runs"], problem["methods"]["SGDM"]["runs"]
    cell = ", ".join(f"{r[key]:.3f}" for r in runs)
    ratio = sum(r["seconds"] for r in runs) / sum(r["seconds"] for r in plain)
    return f"{cell} ({ratio:.1f})" if time else cell


def _range(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return "none"
    return f"{found['low']:.3g} to {found['high']:.3g}"


def write_page(path: Path) -> None:
    """Put the tables of a JSON file into the page."""
    tables = section(json.loads(path.read_text()))
    PAGE.write_text(fill_between(PAGE.read_text(), BEGIN, END, tables))


def main() -> None:
    """Run the study and write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NETWORKS), help="problems, with commas")
    parser.add_argument("--methods", help="methods, separated by semicolons; default: all")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the tables into the page")
    options = parser.parse_args()
    if options.page:
        write_page(options.out)
        return
    options.out.parent.mkdir(exist_ok=True)
    names = list(METHODS) if options.methods is None else options.methods.split(";")
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"problems": {}}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for name in options.only.split(","):
            print(name, flush=True)
            found = study(name, names, options.steps, options.seeds, pool)
            kept["problems"][name] = {"steps": options.steps, "seeds": options.seeds, **found}
            kept["torch"] = torch.__version__
            options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
