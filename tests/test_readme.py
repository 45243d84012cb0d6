"""The README's promises: its example is a tested file, and its commands are the documented ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llqr

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "examples" / "quickstart.py"


def test_readme_holds_the_example_verbatim():
    assert f"```python\n{EXAMPLE.read_text()}```\n" in README


def test_the_example_is_short():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 21


def test_readme_shows_both_commands_on_its_first_screen():
    first_screen = "\n".join(README.splitlines()[:30])
    for command in (
        "python -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[lab]' "
        "&& .venv/bin/llqr demo",
        "python -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]' "
        "&& .venv/bin/pytest",
    ):
        assert command in first_screen


def test_every_method_is_spelled_as_it_works():
    rows = re.findall(r"^\| ([^|]+) \| `(opt\([^`]+)`", README, re.MULTILINE)
    methods = [name for name, _ in rows]
    assert len(methods) == 20
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x, y = torch.randn(8, 4), torch.randint(2, (8,))

    def forward():
        logits = model(x)
        return torch.nn.functional.cross_entropy(logits, y), logits

    for name, code in rows:
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        adamw = torch.optim.AdamW(model.parameters())
        scope = {"opt": llqr.Optimizer, "llqr": llqr, "torch": torch, "model": model, "sgd": sgd}
        scope["adamw"] = adamw
        optimizer = eval(code.replace("(...)", "(model.parameters())"), scope)
        assert (optimizer.geometry is not None) == ("LLQR" in name or "bases" in name)
        assert optimizer.needs_second_pass == ("SAM" in name)
        assert bool(optimizer.minimize(forward).isfinite())


def test_links_of_the_readme_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)#]+)", README) if "://" not in t]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def output():
    command = [sys.executable, "-W", "error", str(EXAMPLE)]
    # One thread: so small a network only loses by more, most of all on a busy machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_trains(output):
    losses = [float(v) for v in re.findall(r"^epoch \d+: loss ([\d.]+)$", output, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < 0.7 * losses[0]


def test_the_example_moves_u(output):
    changes = [float(v) for v in re.findall(r"accepted: .*\|Ug-g\|/\|g\| ([\d.]+)", output)]
    assert len(changes) == 2
    assert min(changes) > 0.1
