"""The plan of ``llqr plan`` against measurements: memory by torch's allocator, time by the clock.

Three networks (a multilayer perceptron, ResNet-18, a small GPT), a step and the refreshes of two
structures. "told" is what the plan says with the rates of this machine, "ratio" told / measured.
With ``--resident`` the peak that the operating system saw in a process of its own stands beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerator_parts.nets import GPT
from common import Classifier, arguments, optimizer_of, peak_memory, resident, show
from torch import nn

import llqr
from llqr.geometry.structures._inner_step import InnerStep
from llqr_lab.models.resnet import resnet18
from llqr_lab.plan.cost import Setting, make_plan
from llqr_lab.plan.counts import Network, count_geometry, count_network
from llqr_lab.plan.rates import measure_rates
from llqr_lab.plan.workload import Workload

NETS = ("mlp", "resnet18", "gpt")
GEOMETRIES: dict[str, Callable[[], Any]] = {
    "diagonal": lambda: llqr.LLQR("diagonal"),
    "kfac": lambda: llqr.LLQR("kfac", block_size=256),
    "paper e-kfac": lambda: llqr.LLQR.paper("e-kfac"),
    "natural e-kfac": lambda: llqr.NaturalGradient("e-kfac", block_size=256, renew_every=1),
}
MIB = 2**20


def build(name: str, device: str) -> Classifier:
    """Return a network with a batch."""
    torch.manual_seed(0)
    with torch.device(device):
        if name == "mlp":
            layers = [nn.Linear(512, 512), nn.ReLU()] * 3
            model = nn.Sequential(*layers, nn.Linear(512, 10))
            for i in (0, 2, 4):
                model[i] = nn.Linear(512, 512)
            x, y = torch.zeros(256, 512), torch.zeros(256, dtype=torch.long)
        elif name == "resnet18":
            model = resnet18(10)
            x, y = torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
        else:
            model = GPT(2000, 128, 256, 4, 4)
            x = torch.zeros(8, 128, dtype=torch.long)
            y = x
        if device != "meta" and x.is_floating_point():
            x.normal_()
            y = torch.randint(10, (len(x),))
        elif device != "meta":
            x.random_(2000)
            y = x.roll(-1, 1)
    return Classifier(model, x, y, device)


def peak_of(call: Callable[[], Any]) -> int:
    """Return the most bytes that torch's allocator held in a call, above those at its start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    peak = held = 0
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def seconds(call: Callable[[], Any], times: int) -> float:
    """Return the median of some times of a call, in seconds of this processor."""
    found = []
    for _ in range(times):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return statistics.median(found)


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for a step and one for each geometry."""
    p, on_meta = build(name, "cpu"), build(name, "meta")
    workload = Workload(name, on_meta.model, (on_meta.x,), {})
    network = count_network(workload)
    p.step()
    p.model.zero_grad()
    rates = [measure_rates()]
    step = seconds(p.step, 5 * options.repeats)
    rates.append(measure_rates())
    p.model.zero_grad()
    told = statistics.mean(rate.seconds(network.step) for rate in rates)
    rows = [row(name, "step", network.step.peak, peak_of(p.step), told, step)]
    print(rows[0], flush=True)
    p.model.zero_grad()
    for title in options.geometries:
        if name != "mlp" and title.startswith("paper"):
            continue  # matrices of thousands of rows, 50 times: hours
        rows.append(refresh_row(name, title, p, workload, network, options))
        print(rows[-1], flush=True)
    return rows


def refresh_row(
    name: str,
    title: str,
    p: Classifier,
    workload: Workload,
    network: Network,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure a second refresh, in memory and in time, and say what was told of it.

    What else the machine does changes its rates, so they are measured before and after.
    """
    geometry = GEOMETRIES[title]()
    geometry.bind(p.model)
    geometry.refresh([p])
    reports: list[llqr.RefreshReport] = []
    measured = peak_of(lambda: reports.append(geometry.refresh([p], step=1)))
    steps = inner_steps_of(lambda: reports.append(geometry.refresh([p], step=2)))
    rates = [measure_rates()]
    took = seconds(lambda: reports.append(geometry.refresh([p], step=3)), options.repeats)
    rates.append(measure_rates())
    products = [report.products or 0 for report in reports]
    counts = {
        n: count_geometry(title, GEOMETRIES[title](), workload, network, n, steps)
        for n in set(products)
    }
    setting = Setting(passes=1, base="sgd")
    plan = make_plan(network, counts[products[0]], setting, rates[0])
    told_s = statistics.median(
        statistics.mean(make_plan(network, counts[n], setting, r).refresh_seconds for r in rates)
        for n in products[2:]
    )
    told = plan.refresh_graph + plan.refresh_vectors
    made = row(name, title, told, measured, told_s, took)
    made["products"], made["inner steps"] = products[-1], steps
    if options.resident:
        made["resident MiB"] = peak_memory(__file__, "--child", name, title)
        made["told in all"] = plan.refresh / MIB
    return made


def inner_steps_of(call: Callable[[], Any]) -> int | None:
    """Return how many inner steps a refresh made, if it made them on vectors."""
    made: dict[int, int] = {}
    take_step = InnerStep.take_step

    def counted(step: InnerStep, *arguments: Any) -> None:
        made[id(step)] = made.get(id(step), 0) + 1
        take_step(step, *arguments)

    InnerStep.take_step = counted  # type: ignore[method-assign]
    try:
        call()
    finally:
        InnerStep.take_step = take_step  # type: ignore[method-assign]
    return max(made.values(), default=0) or None


def row(
    net: str, what: str, told: float, measured: float, told_s: float, took: float
) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "network": net,
        "what": what,
        "told MiB": told / MIB,
        "measured MiB": measured / MIB,
        "memory ratio": told / measured,
        "told s": told_s,
        "measured s": took,
        "time ratio": told_s / took,
    }


def child(name: str, title: str) -> None:
    """Print the peak of a process that takes a step and two refreshes."""
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    before = resident()
    p = build(name, "cpu")
    optimizer = optimizer_of(p, GEOMETRIES[title]())
    for _ in range(2):
        optimizer.refresh(p)
    print(resident("VmHWM") - before)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    parser = arguments(__doc__, nets=NETS, geometries=tuple(GEOMETRIES))
    parser.add_argument("--resident", action="store_true", help="also what the system saw")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(*options.child)
    rows = [row for name in options.nets for row in rows_of(name, options)]
    show("The plan and what was measured", rows, options)


if __name__ == "__main__":
    main()
