"""Check an installed llqr in an environment that has torch and nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch

extras = [m for m in ("numpy", "sklearn", "matplotlib", "tqdm") if importlib.util.find_spec(m)]
if extras:
    raise SystemExit(f"not a clean environment: it has {', '.join(extras)}")
before = {name.partition(".")[0] for name in sys.modules}

import llqr  # noqa: E402  (after the look at what torch alone has loaded)

loaded = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
if loaded != {"llqr"}:
    raise SystemExit(f"import llqr also loaded {sorted(loaded - {'llqr'})}")
home = Path(llqr.__file__).parent
if not home.is_relative_to(sys.prefix):
    raise SystemExit(f"llqr was imported from {home}, not from the installed wheel")
for package in ("llqr", "llqr_lab"):
    if not (home.parent / package / "py.typed").is_file():
        raise SystemExit(f"{package}/py.typed is not installed")
if importlib.metadata.version("llqr") != llqr.__version__:
    raise SystemExit("llqr.__version__ is not the installed version")
print(f"llqr {llqr.__version__}, torch {torch.__version__}: imports with torch alone")
