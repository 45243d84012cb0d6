"""``llqr plan MODEL``: what a geometry would cost on a network, before anything is bought."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import llqr

from ..common.output import table_lines
from ..plan.cost import BASES, Plan, Setting, make_plan
from ..plan.counts import count_geometry, count_network
from ..plan.rates import Rates, measure_rates
from ..plan.workload import PlanError, load_workload

__all__ = ["add_arguments", "main"]

GIB = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRUCTURES = ("diagonal", "diag-kfac", "kfac", "e-kfac")


class Metric(NamedTuple):
    """What makes U, the usual steps between its refreshes, and what the overhead consists of."""

    kind: type[Any]
    every: float
    overhead: str


REFRESHED = "applying U in each step, and a refresh"
METRICS = {
    "llqr": Metric(llqr.LLQR, 100, REFRESHED),
    "natural": Metric(llqr.NaturalGradient, 100, REFRESHED),
    # Its refresh is a step that renews the bases.
    "moments": Metric(
        llqr.GradientMoments,
        10,
        "averages and rotations into the bases in each step, and new bases (refresh)",
    ),
}

ABOUT = """\
Says what a geometry would cost on a network: bytes per device, floating-point operations, bytes
sent, and the overhead over training without it. The network is built on the meta device, so that
neither its weights nor a network connection are needed, and a model of any size takes seconds to
minutes. The documentation's page What a large network would need says how the numbers are counted,
and how near they were to measured ones.

examples:
  llqr plan resnet18 --batch 128 --input 3x32x32
      a network of this project, on this machine
  llqr plan vit-l16 --batch 4 --budget 24
      which structures fit in 24 GiB
  llqr plan transformers/LlamaConfig --input 2048 --batch 1 --world 8 64 --fsdp \\
      --dtype bfloat16 --flops 400e12 --memory-rate 2e12 --network-rate 50e9
      a decoder of 7 billion parameters on 8 and on 64 accelerators
  llqr plan transformers/my_config.json --input 1024 --set num_hidden_layers=4
      a configuration as transformers saves it, with one field changed
  llqr plan timm/convnext_tiny --structure kfac --metric natural --json
  llqr plan resnet18 --batch 128 --input 3x32x32 --metric moments --base adamw --passes 1
      AdamW in the bases of the gradients' moments
  llqr plan my_package.my_module:make_model --input 64 --set width=256
      whatever a function without required arguments returns
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the geometry, the machines and the form of the output."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = ABOUT
    add = parser.add_argument
    add("model", metavar="MODEL", help="a name, timm/NAME, transformers/CONFIG or module:factory")
    what = parser.add_argument_group("the training")
    add = what.add_argument
    add("--batch", type=int, default=32, metavar="N", help="of one device (default: %(default)s)")
    add(
        "--input",
        type=_shape,
        default=(3, 224, 224),
        metavar="SHAPE",
        help="of one sample: 3x32x32, or the number of tokens (default: 3x224x224)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of the parameters (%(default)s)")
    add("--base", choices=BASES, default="momentum", help="the base optimizer (%(default)s)")
    add(
        "--passes", type=int, choices=(1, 2), default=2, help="of a step; SAM takes 2 (%(default)s)"
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the factory or field of the configuration; repeatable",
    )
    how = parser.add_argument_group("the geometry")
    add = how.add_argument
    add("--structure", nargs="+", default=list(STRUCTURES), metavar="NAME", help="default: four")
    add(
        "--metric",
        choices=METRICS,
        default="llqr",
        help="LLQR, NaturalGradient, or a base in the bases of GradientMoments (%(default)s)",
    )
    add("--block-size", type=int, default=512, metavar="N", help="0: whole (default: %(default)s)")
    add("--products", type=int, default=5, metavar="N", help="of a refresh (default: %(default)s)")
    add("--inner-steps", type=int, metavar="N", help="that it makes (default: all of the setting)")
    add(
        "--every",
        type=float,
        metavar="STEPS",
        help="between refreshes, or new bases of moments (default: "
        + ", ".join(f"{name} {metric.every:g}" for name, metric in METRICS.items())
        + ")",
    )
    _add_machines(parser)
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def _add_machines(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the machines").add_argument
    add("--world", type=int, nargs="+", default=[1], metavar="N", help="devices (default: 1)")
    add("--fsdp", action="store_true", help="everything is cut over the devices (FSDP2)")
    add("--shard", action="store_true", help="U is cut over the devices")
    add("--budget", type=float, metavar="GIB", help="of a device: says what fits")
    add("--flops", type=float, metavar="RATE", help="operations per second (default: measured)")
    add("--memory-rate", type=float, metavar="RATE", help="bytes per second (default: measured)")
    add("--network-rate", type=float, default=25e9, metavar="RATE", help="bytes per second sent")
    add(
        "--float32",
        type=float,
        default=1.0,
        metavar="PART",
        help="of --flops that U's products reach, which are in float32 (default: %(default)s)",
    )
    add(
        "--call-time",
        type=float,
        metavar="S",
        help="seconds of a call (default: measured; with given rates 5e-6)",
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected 3x224x224 or 1024, got {text!r}") from None


def main(arguments: argparse.Namespace) -> int:
    """Count and print; 2 if the model or a setting is not known."""
    try:
        plans, rates = plan_all(arguments)
    except (PlanError, ValueError, OSError) as error:
        print(f"llqr plan: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        content = {
            "model": arguments.model,
            "rates": vars(rates),
            "plans": [{"world": n, **plan.plain_row()} for n, plan in plans],
        }
        print(json.dumps(content, indent=2))
        return 0
    print("\n".join(table_lines([_row(n, plan, arguments.budget) for n, plan in plans])))
    print(_notes(*plans[0], arguments, rates))
    return 0


def plan_all(arguments: argparse.Namespace) -> tuple[list[tuple[int, Plan]], Rates]:
    """Return (devices, plan) for each structure, and the rates they were made with."""
    if arguments.metric == "moments" and (arguments.fsdp or arguments.shard):
        raise PlanError(
            "--metric moments: a base in the bases needs whole gradients and U on every device; "
            "leave out --fsdp and --shard"
        )
    workload = load_workload(
        arguments.model,
        arguments.batch,
        arguments.input,
        _settings(arguments.set),
        DTYPES[arguments.dtype],
    )
    network = count_network(workload)
    rates = _rates(arguments)
    settings = [
        Setting(
            world,
            arguments.fsdp,
            arguments.shard,
            arguments.base,
            arguments.passes,
            _every(arguments),
        )
        for world in arguments.world
    ]
    plans = []
    for structure in arguments.structure:
        geometry = METRICS[arguments.metric].kind(
            structure, block_size=arguments.block_size or None
        )
        counts = count_geometry(
            structure,
            geometry,
            workload,
            network,
            arguments.products,
            arguments.inner_steps,
            host=not _rates_are_given(arguments),
        )
        plans += [(s.world, make_plan(network, counts, s, rates)) for s in settings]
    return plans, rates


def _every(arguments: argparse.Namespace) -> float:
    """Return the steps between refreshes."""
    given: float | None = arguments.every
    return METRICS[arguments.metric].every if given is None else given


def _rates(arguments: argparse.Namespace) -> Rates:
    """Return the rates that were given, and those of this machine for the others."""
    a = arguments
    if _rates_are_given(a):
        rates = Rates(a.flops, a.memory_rate)
    else:
        here = measure_rates()
        rates = replace(here, flops=a.flops or here.flops, memory=a.memory_rate or here.memory)
    call = rates.call if a.call_time is None else a.call_time
    return replace(rates, network=a.network_rate, float32=a.float32, call=call)


def _rates_are_given(arguments: argparse.Namespace) -> bool:
    """Tell whether the plan is for another device than this processor."""
    return bool(arguments.flops and arguments.memory_rate)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise PlanError(f"--set: expected KEY=VALUE, got {pair!r}")
        try:
            settings[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key] = text
    return settings


def _row(world: int, plan: Plan, budget: float | None) -> dict[str, Any]:
    """Return what the table shows: GiB, and overhead in per cent."""
    row: dict[str, Any] = {
        "structure": plan.name,
        "devices": world,
        "U GiB": plan.preconditioner / GIB,
        "step GiB": plan.step / GIB,
        "refresh GiB": plan.refresh / GIB,
        "of it vectors": plan.refresh_vectors / GIB,
        "U g TFLOP": plan.apply_flops / 1e12,
        "refresh TFLOP": plan.refresh_flops / 1e12,
        "refresh sends GiB": plan.refresh_sent / GIB,
        "refresh steps": plan.refresh_seconds / plan.step_seconds,
        "overhead %": 100 * plan.overhead,
    }
    if budget is not None:
        row["fits"] = "yes" if plan.peak <= budget * GIB else "no"
    return row


def _notes(world: int, plan: Plan, arguments: argparse.Namespace, rates: Rates) -> str:
    spread = "cut by FSDP2" if arguments.fsdp else "copied to each"
    return (
        f"\nPer device of {world}, {spread}, batch {arguments.batch}: parameters "
        f"{plan.parameters / GIB:.2f} GiB, gradients {plan.gradients / GIB:.2f}, base "
        f"{plan.base / GIB:.2f}, activations {plan.activations / GIB:.2f}, graph of a refresh "
        f"{plan.refresh_graph / GIB:.2f}.\nA step of {arguments.passes} passes: "
        f"{plan.step_flops / 1e12:.3g} TFLOP, sends {plan.step_sent / GIB:.2f} GiB, "
        f"{plan.step_seconds:.3g} s at {rates.flops:.3g} operations and {rates.memory:.3g} bytes "
        f"per second.\nOverhead: {METRICS[arguments.metric].overhead} every "
        f"{_every(arguments):g}."
    )
