"""Kernel launches, copies and reads of the device per step, and the time around the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Clock
from step import own

import llqr

from ._report import Report
from .speed import ALL, METHODS, base_of, make, plain_step, pretend_refreshed, step_of

#: What is counted: the names of the profiler's events begin so.
COUNTED = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel"),
    "copies": ("cudaMemcpyAsync",),
    "copies to the host": ("Memcpy DtoH",),
    "reads": ("aten::_local_scalar_dense",),
    "items": ("aten::item",),
    "waits": ("cudaStreamSynchronize", "cudaDeviceSynchronize"),
}


def run(report: Report) -> None:
    """Count, then time what llqr spends outside of forward, backward and the base's step."""
    made: list[Any] = []

    def model() -> Any:
        if not made:
            made.append(make("resnet18", report.device, report.reduced))
        return made[0]

    for method in ALL:
        report.check(
            f"resnet18: {method}, launches per step", lambda m=method: count(m, model, report)
        )
    for method in METHODS:
        report.check(
            f"resnet18: {method}, time outside of forward, backward and the base's step, in steps",
            lambda m=method: outside(m, model(), report),
        )


def count(method: str, model: Callable[[], Any], report: Report) -> tuple[float, str]:
    """Return the launches of a step, and a text with all counts."""
    step = step_of("resnet18", method, model())
    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if report.device == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if report.device == "cuda":
            torch.cuda.synchronize()
    found = dict.fromkeys(COUNTED, 0)
    for event in profile.key_averages():
        for name, beginnings in COUNTED.items():
            if event.key.startswith(beginnings):
                found[name] += event.count
    return found["launches"], ", ".join(f"{n} {name}" for name, n in found.items())


def outside(method: str, p: Any, report: Report) -> tuple[float, str]:
    """Return what a minimize spends by itself, in steps of the base."""
    clock, repeats = Clock(report.device), 2 if report.reduced else 9
    base = base_of("resnet18", p)
    step = clock.medians({"base": lambda: plain_step(p, base)}, repeats, warm=2)["base"]
    options = METHODS[method]()
    optimizer = llqr.Optimizer(base_of("resnet18", p), p.model, **options)
    pretend_refreshed(optimizer.geometry)
    seconds = own(optimizer, p, clock, repeats)
    return seconds / step, f"{1e3 * seconds:.2f} ms"
