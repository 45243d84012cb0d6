"""The examples of the integrations run and learn."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from integrations.small import forget_accelerator

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_trainer": ["lightning"],
    "fabric_loop": ["lightning"],
    "accelerate_loop": ["accelerate"],
    "huggingface_trainer": ["transformers", "accelerate"],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:the forward's autocast is switched off"),
]


@pytest.mark.parametrize("example", NEEDS)
def test_an_example(example, tmp_path, monkeypatch, capsys):
    for package in NEEDS[example]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    if "accelerate" in NEEDS[example]:
        forget_accelerator()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = re.search(r"^loss ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE).groups()
    assert float(last) < 0.6 * float(first)
    assert "accepted" in printed


def test_no_example_is_left_out():
    text = {p.stem: p.read_text() for p in EXAMPLES.glob("*.py")}
    assert set(NEEDS) == {name for name, code in text.items() if "llqr.integrations" in code}
