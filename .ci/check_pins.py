"""Check that constraints.txt pins every package of this environment, at the installed version.

Usage: python check_pins.py CONSTRAINTS
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

# The environment's own tools, and what a CUDA build of torch pins itself.
EXEMPT = re.compile(r"(pip|setuptools|wheel|llqr|triton|nvidia-.*|cuda-.*)")


def normal(name: str) -> str:
    """Return a package name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Compare; exit with the differences."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    pins = {normal(name): version for name, version in pins.items()}
    problems = []
    for package in importlib.metadata.distributions():
        name, version = normal(package.metadata["Name"]), package.version.partition("+")[0]
        if not EXEMPT.fullmatch(name) and pins.get(name) != version:
            problems.append(f"{name} {version} is installed, pinned: {pins.get(name)}")
    if problems:
        raise SystemExit("\n".join(sorted(problems)))


if __name__ == "__main__":
    main()
