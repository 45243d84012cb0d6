"""Check that a wheel holds every file of the source tree, and nothing else.

Usage: python check_wheel.py SRC WHEEL
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def source_files(src: Path) -> set[str]:
    """Return the files that belong into the wheel, relative to ``src``."""
    ignored = ("__pycache__", ".egg-info", "_cache")
    return {
        path.relative_to(src).as_posix()
        for path in src.rglob("*")
        if path.is_file() and not any(part.endswith(ignored) for part in path.parts)
    }


def wheel_files(wheel: Path) -> set[str]:
    """Return the files of a wheel, its metadata left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def main() -> None:
    """Compare; exit with the differences."""
    expected, found = source_files(Path(sys.argv[1])), wheel_files(Path(sys.argv[2]))
    typed = {"llqr/py.typed", "llqr_lab/py.typed"}
    problems = [f"missing in the wheel: {name}" for name in sorted((expected | typed) - found)]
    problems += [f"only in the wheel: {name}" for name in sorted(found - expected)]
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{len(found)} files in the wheel, all of src")


if __name__ == "__main__":
    main()
