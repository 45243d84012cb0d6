"""What a number was measured with."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import llqr

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Return processor, cores and versions; every process of the lab computes with one thread."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads_a_process": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llqr": llqr.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
