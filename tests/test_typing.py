"""What a type checker says of a user's code: mypy --strict on small files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = """
import torch
import llqr

model = torch.nn.Linear(2, 1)
base = torch.optim.SGD(model.parameters(), lr=0.1)
"""

GOOD = """
optimizer = llqr.Optimizer(base, model, geometry=llqr.LLQR("kfac"), perturbation=llqr.SAM(0.1))
text: str = optimizer.geometry.summary()
stored: int = optimizer.geometry.numel()
bytes_of: dict[str, int] = optimizer.geometry.memory()
every = optimizer.geometry.settings.every
plain = llqr.Optimizer(base, model)
fixed = llqr.Optimizer(base, model, geometry=llqr.FixedGeometry(torch.eye(3)))
fixed.geometry.spectrum()
joined = llqr.Optimizer([base, torch.optim.AdamW([])], model, geometry=llqr.LLQR("kfac"))
joined.geometry.summary()


def name_of(optimizer: llqr.Optimizer) -> str:
    return type(optimizer.base).__name__


class Sign(llqr.Perturbation):
    def displacement(self, probe: llqr.Probe) -> dict[str, torch.Tensor] | None:
        return {n: probe.radii[n] * g.sign() for n, g in probe.gradients.items()}


def structure_of(name: str, parameter: torch.Tensor) -> str:
    return "kfac" if parameter.dim() > 1 else "diagonal"


name_of(llqr.Optimizer(base, model, geometry=llqr.LLQR(structure_of), perturbation=Sign(0.1)))
llqr.LLQR("e-kfac", bases="gradient", every=lambda step: 10.0, solver="adam", scale=2.0)
llqr.LLQR.paper("kfac", "newton")
"""

BAD = {
    'llqr.LLQR("kfak")': "kfak",
    'llqr.LLQR("kfac", curvature="fischer")': "fischer",
    'llqr.LLQR("kfac", solver="nestrov")': "nestrov",
    'llqr.LLQR("kfac", bases="learnt")': "learnt",
    'llqr.LLQR("kfac", constraint="positiv")': "positiv",
    'llqr.LLQR("kfac", scale="average")': "average",
    'llqr.LLQR("kfac", application="fp16")': "fp16",
    'llqr.SAM(0.1, norm="metrics")': "metrics",
    'llqr.SAM(0.1, direction="up")': "up",
    'llqr.Optimizer(base, model, buffers="dirty")': "dirty",
    'llqr.Optimizer(base, model, geometry=llqr.LLQR("kfac")).geometry.sumary()': "sumary",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """{statement: mypy's errors}, all found in one run; "" for the good code."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "good.py").write_text(HEAD + GOOD)
    for i, statement in enumerate(BAD):
        (folder / f"bad{i}.py").write_text(f"{HEAD}\n{statement}\n")
    result = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--no-error-summary",
            "--config-file", "", "--cache-dir", str(folder / "cache"),
            *sorted(str(p.name) for p in folder.glob("*.py")),
        ],
        cwd=folder,
        env={"MYPYPATH": str(ROOT / "src"), "PATH": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    found = {s: [x for x in lines if x.startswith(f"bad{i}.py")] for i, s in enumerate(BAD)}
    return {**found, "": [x for x in lines if "bad" not in x.partition(":")[0]]}


@pytest.mark.slow
def test_code_that_is_right_passes(errors):
    assert errors[""] == []


@pytest.mark.slow
@pytest.mark.parametrize("statement", BAD)
def test_a_wrong_option_fails(errors, statement):
    assert len(errors[statement]) == 1 and BAD[statement] in errors[statement][0]
