"""``llqr study NAME``: methods on problems, tuned alike, at equal steps and equal seconds."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..common.processes import available_workers
from ..data.errors import DataError
from ..study.estimate import estimate_lines
from ..study.page import write_page
from ..study.pictures import draw_study
from ..study.plan import STUDIES
from ..study.problems import SCALES
from ..study.readings import collect, write_results
from ..study.run import make_setup, run_study
from ..study.training import Device

__all__ = ["add_arguments", "main"]

ABOUT = """\
Tunes methods alike on problems, then runs them on fresh seeds: at equal steps, at equal seconds of
the processor, and to a target. A study that was killed goes on when the same command is given
again. The documentation's page Where it wins says how it is done and what came out.

studies:
"""

EXAMPLES = """\
examples:
  llqr study proof --scale smoke                          seconds, to see that it runs
  llqr study proof --dry                                  what it would take
  llqr study proof --methods 'SGDM;SAM;NG' --problems cnn
  llqr study proof                                        goes on after an interruption
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the study's name, its scale, and what to run of it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, STUDIES)) + 2
    parser.description = ABOUT + "\n".join(f"  {n:{width}}{s.title}" for n, s in STUDIES.items())
    parser.epilog = EXAMPLES
    parser.add_argument("study", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--scale", choices=SCALES, default="small", help="default: %(default)s")
    parser.add_argument("--problems", type=_names, metavar="A,B", help="only these")
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="A,B",
        help="only these and the baselines; with ; between if a name has a comma",
    )
    parser.add_argument("--workers", type=int, default=available_workers(), metavar="N")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/study"), metavar="DIR",
        help="folder of the runs and the results (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda (default: that of the study)")
    parser.add_argument("--dry", action="store_true", help="only estimate what it would take")
    parser.add_argument(
        "--page", action="store_true",
        help="run nothing: keep the results among those of the checkout, write docs/study.md",
    )  # fmt: skip


def _names(text: str) -> list[str]:
    names = text.split(";" if ";" in text else ",")
    return [name.strip() for name in names if name.strip()]


def main(arguments: argparse.Namespace) -> int:
    """Run, collect, draw; 2 if it cannot begin."""
    try:
        return _study(arguments)
    except (DataError, ValueError, RuntimeError) as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2


def _study(arguments: argparse.Namespace) -> int:
    study = STUDIES[arguments.study]
    device = study.device if arguments.device is None else Device(arguments.device)
    if arguments.scale == "smoke":
        device = Device(arguments.device or "cpu", study.device.bfloat16)
    if device.name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: there is no CUDA device here; --device cpu runs it without")
    setup = make_setup(
        arguments.study, arguments.scale, arguments.problems, arguments.methods, arguments.out,
        device,
    )  # fmt: skip
    if arguments.page and arguments.methods is None:  # whatever was run of it
        setup = replace(setup, methods=[*study.methods])
    if arguments.dry:
        print("\n".join(estimate_lines(setup)))
        return 0
    if not arguments.page:
        run_study(setup, arguments.workers, lambda line: print(line, flush=True))
    results = collect(setup)
    path = write_results(arguments.out / f"{setup.name}-{setup.scale}.json", results)
    written = [path, *draw_study(results, arguments.out)]
    if arguments.page:
        written = _keep_results(results)
    for path in written:
        print(f"wrote {path}")
    return 0


def _keep_results(results: dict[str, object]) -> list[Path]:
    """Put results among those of the checkout in this folder, and into its page."""
    page, kept = Path("docs/study.md"), Path("benchmarks/results/study.json")
    if not page.exists():
        raise ValueError(f"page: there is no {page} here; run this in a checkout of llqr")
    everything = json.loads(kept.read_text()) if kept.exists() else {}
    write_results(kept, {**everything, str(results["study"]): results})
    pictures = draw_study(results, page.parent / "images")
    pages = [write_page(path, kept) for path in (page, Path("README.md"))]
    return [kept, *pages, *pictures]
