"""What a number was measured with."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import llqr

__all__ = ["describe_environment", "processor_name"]


def describe_environment(threads: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """Return processor, cores and versions, and the accelerator if one is used.

    Args:
        threads: of each process.
        device: what was computed on; None: the processor.
    """
    cuda = device is not None and device.type == "cuda"
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads_a_process": threads,
        **({"accelerator": torch.cuda.get_device_name(device)} if cuda else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llqr": llqr.__version__,
    }


def processor_name() -> str:
    """Return what the processor calls itself."""
    try:
        # platform.processor() says no more than the architecture on Linux.
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
