"""kill -9 in a second pass and in a refresh, then resume: the bits of a run that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from launch import run

from tiny import same

SCRIPT = Path(__file__).parent / "train.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_bitwise(ranks, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    codes, printed = run(SCRIPT, str(alone), ranks=ranks)
    assert codes == [0] * ranks, printed
    for where, step in (("second pass", 7), ("product", 10)):
        codes, printed = run(SCRIPT, str(killed), where, str(step), ranks=ranks)
        assert codes[-1] == -signal.SIGKILL, printed
        assert f"killed {where} {step}" in printed and 0 not in codes, printed
    codes, printed = run(SCRIPT, str(killed), ranks=ranks)
    assert codes == [0] * ranks and "resumed at 9" in printed, printed
    finals = [torch.load(folder / "final.pt", weights_only=True) for folder in (killed, alone)]
    same(*finals)
