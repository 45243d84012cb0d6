"""The parts of benchmarks/accelerator.py: each is a function of a Report."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from ._report import Report

__all__ = ["run_part"]


def run_part(options: argparse.Namespace, budget: float) -> None:
    """Run the part that ``options.child`` names for ``budget`` seconds; its rows go to its log."""
    part, log = options.child
    report = Report(
        part,
        Path(log),
        budget=budget,
        device=options.device,
        reduced=options.reduced,
        match=options.match,
    )
    try:
        report.write({"machine": describe_machine(options.device)})
        module = importlib.import_module(f"{__name__}.{part}")
        module.run(report)
    except Exception:
        text = " / ".join(traceback.format_exc().splitlines()[-4:])
        report.write({"part": part, "name": "the part itself", "status": "failed", "error": text})


def describe_machine(device: str) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    import torch

    import llqr

    found = {
        "torch": torch.__version__,
        "llqr": llqr.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": device,
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "command": " ".join(sys.argv[1:]),
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found
