"""Steps and refreshes in steps of the base, and their peak memory; in bfloat16 autocast."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Classifier, Clock
from refresh import Refresh
from step import written_out
from torch import nn

import llqr
from llqr_lab.models.resnet import resnet18
from llqr_lab.models.vit import vit

from ._report import Report
from .nets import GPT, Autocast

GEOMETRIES = ("diagonal", "kfac", "e-kfac")
#: The methods that are timed: what llqr.Optimizer is given.
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "wrapper alone": dict,
    "SAM": lambda: {"perturbation": llqr.SAM(0.05)},
    "ASAM": lambda: {"perturbation": llqr.ASAM(0.5)},
    "FisherSAM": lambda: {"perturbation": llqr.FisherSAM(0.05)},
    "FriendlySAM": lambda: {"perturbation": llqr.FriendlySAM(0.05)},
    **{
        f"SAM + {structure}": lambda s=structure: {
            "geometry": llqr.LLQR(s, every=10**9, block_size=512),
            "perturbation": llqr.SAM(0.05),
        }
        for structure in GEOMETRIES
    },
}


def run(report: Report) -> None:
    """Time the networks, from the one that takes least to the one that takes most."""
    for name in ("resnet18", "vit-s", "gpt2"):
        # The model is made once, and dropped before the next.
        made: list[Classifier] = []

        def model(name: str = name, made: list[Classifier] = made) -> Classifier:
            if not made:
                made.append(make(name, report.device, report.reduced))
            return made[0]

        peaks = measure_memory(report, name, model)
        measure_steps(report, name, model)
        for structure in GEOMETRIES:
            measure_refresh(report, name, model, llqr.LLQR, structure, peaks)
        made.clear()


def make(name: str, device: str, reduced: bool = False) -> Classifier:
    """Return a network with a batch of random data."""
    torch.manual_seed(0)
    if name == "resnet18":
        rows, side = (4, 8) if reduced else (128, 32)
        model: nn.Module = resnet18(10, width=4, blocks=(1, 1)) if reduced else resnet18(10)
        x, y = torch.randn(rows, 3, side, side), torch.randint(10, (rows,))
    elif name == "vit-s":
        rows, side = (4, 32) if reduced else (64, 224)
        small = {"width": 16, "depth": 1, "heads": 2} if reduced else {}
        model = vit(100, size="S", patch=16, image=side, **small)
        x, y = torch.randn(rows, 3, side, side), torch.randint(100, (rows,))
    else:
        model = GPT(100, 16, 16, 1, 2) if reduced else GPT()
        tokens = torch.randint(100 if reduced else 50257, (2, 17) if reduced else (8, 513))
        x, y = tokens[:, :-1], tokens[:, 1:]
    if reduced:  # few processors have instructions for bfloat16
        return Classifier(model, x, y, device)
    return Autocast(model, x, y, device, torch.bfloat16)


def base_of(name: str, p: Classifier) -> torch.optim.Optimizer:
    """Return the base that such a network is trained with."""
    if name == "resnet18":
        return torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)
    return torch.optim.AdamW(p.model.parameters(), lr=1e-5)


def plain_step(p: Classifier, base: torch.optim.Optimizer) -> None:
    """Do a step of the base, without this library."""
    base.zero_grad()
    p()[0].backward()
    base.step()


def step_of(name: str, method: str, p: Classifier) -> Callable[[], Any]:
    """Return a step of a method: of the base, of a SAM written out, or of this library."""
    base = base_of(name, p)
    if method == "base":
        return lambda: plain_step(p, base)
    if method == "SAM written out":
        return lambda: written_out(p, base, 0.05)
    optimizer = llqr.Optimizer(base, p.model, **METHODS[method]())
    pretend_refreshed(optimizer.geometry)
    return lambda: optimizer.minimize(p)


def pretend_refreshed(geometry: llqr.Geometry | None) -> None:
    """Take U off the identity without the time of a refresh: a step computes the same."""
    if geometry is not None:
        moved = {n: {k: 1.01 * v for k, v in e.items()} for n, e in geometry.state().items()}
        geometry.load_state(moved)
        geometry.load_counters({**geometry.counters(), "refreshes": 1, "last": 0})


ALL = ("base", "wrapper alone", "SAM written out", *(m for m in METHODS if m != "wrapper alone"))


def measure_steps(report: Report, name: str, model: Callable[[], Classifier]) -> None:
    """Time a step of each method in turns; one row for each, and the seconds of the base's."""
    times: dict[str, float] = {}

    def take() -> tuple[float, str]:
        p = model()
        steps = {method: step_of(name, method, p) for method in ALL}
        repeats = 2 if report.reduced else 9
        times.update(Clock(report.device).medians(steps, repeats, warm=3))
        return times["base"], "seconds"

    report.check(f"{name}: base step, seconds", take)
    for method in ALL[1:]:
        report.check(
            f"{name}: {method}, over the base's step",
            lambda m=method: (times[m] / times["base"], f"{1e3 * times[m]:.1f} ms"),
        )


def measure_memory(report: Report, name: str, model: Callable[[], Classifier]) -> dict[str, float]:
    """Take the peak of a step of each method by itself, over that of the base's; return MiB."""
    peaks: dict[str, float] = {}
    if report.device != "cuda":
        return peaks

    def peak(method: str) -> tuple[float, str]:
        p = model()
        p.model.zero_grad()
        gc.collect()  # the method before is gone, circles included
        torch.cuda.empty_cache()
        step = step_of(name, method, p)
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[method] = torch.cuda.max_memory_allocated() / 2**20
        return peaks[method] / peaks["base"], f"{peaks[method]:.0f} MiB"

    for method in ALL:
        report.check(f"{name}: peak memory of {method}, over the base's", lambda m=method: peak(m))
    return peaks


def measure_refresh(
    report: Report,
    name: str,
    model: Callable[[], Classifier],
    kind: Callable[..., llqr.StructuredGeometry],
    structure: str,
    peaks: dict[str, float],
) -> None:
    """Time a refresh, over the base's step just before it; with its peak memory."""

    def take() -> tuple[float, str]:
        p, clock = model(), Clock(report.device)
        base = base_of(name, p)
        steps = {"base": lambda: plain_step(p, base)}
        step = clock.medians(steps, 2 if report.reduced else 7, warm=2)["base"]
        base.zero_grad()
        refresh = Refresh(p, kind, structure=structure, every=10**9, block_size=512)
        began = time.perf_counter()
        refresh()  # the first also compares the library's operations with torch's
        first = time.perf_counter() - began
        if report.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        took = clock.medians({"refresh": refresh}, 1 if first > 5 else 3, warm=0)["refresh"]
        found = refresh.report
        note = f"{took:.3f} s, {found.products} products, first {first:.2f} s"
        note += f", |Ug-g|/|g| {found.change:.2g}" if found.accepted else f", {found.reason}"
        if report.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            note += f", peak {peak:.0f} MiB"
            note += f" ({peak / peaks['base']:.2f} of a step's)" if "base" in peaks else ""
        return took / step, note

    report.check(f"{name}: refresh of {kind.__name__} {structure}, in steps", take)
