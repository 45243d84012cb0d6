"""The core of the suite with every minor version of torch that llqr supports.

    pip install -c constraints.txt nox
    nox -s "core(2.8.0)"        one version
    nox -s core                 all of them
    nox -s small                the oldest, a few minutes: the second stage of .ci/run

Each session makes its own environment. On Linux the package index serves CUDA builds, some GB
each; they run on a CPU too. Arguments after -- go to pytest.
"""

from __future__ import annotations

from pathlib import Path

import nox

#: torch: the Python it is run with, so that every pair of neighbours meets once.
VERSIONS = {
    "2.8.0": "3.10",
    "2.9.1": "3.12",
    "2.10.0": "3.11",
    "2.11.0": "3.12",
    "2.12.1": "3.13",
    "2.13.0": "3.11",
    "2.14.1": "3.13",
}
OLDEST = next(iter(VERSIONS))
#: What the tests of the core import; the lab's and the frameworks' tests skip what is missing.
TOOLS = ("numpy", "pytest", "pytest-xdist", "hypothesis")
#: What depends most on torch: curvature products, replaced operations, and steps.
SMALL = (
    "tests/test_import.py",
    "tests/test_contract.py",
    "tests/curvature/expansions/test_ways.py",
    "tests/curvature/linearised/test_batch_norm.py",
    "tests/test_optimizer.py",
)


def core_tests() -> list[str]:
    """Return the tests of the numerical core: torch's own suite and the lab's are left out."""
    files = sorted(str(path) for path in Path("tests").glob("test_*.py"))
    folders = [f"tests/{name}" for name in ("curvature", "geometry", "perturbations")]
    return folders + [file for file in files if file != "tests/test_torch_suite.py"]


def run(session: nox.Session, version: str, tests: list[str]) -> None:
    """Install one torch and llqr, and run tests with one thread."""
    session.install(f"torch=={version}", "setuptools", *TOOLS)
    session.install("--no-deps", "-e", ".")
    session.env.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    session.run("pytest", "-q", "-rs", "-m", "not slow", *tests, *session.posargs)


@nox.session
@nox.parametrize(
    "python,torch", [nox.param(python, torch, id=torch) for torch, python in VERSIONS.items()]
)
def core(session: nox.Session, torch: str) -> None:
    """The numerical core with one version of torch."""
    run(session, torch, core_tests())


@nox.session
def small(session: nox.Session) -> None:
    """A small core with the oldest version of torch."""
    run(session, OLDEST, list(SMALL))
