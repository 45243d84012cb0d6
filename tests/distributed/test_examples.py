"""The two examples, as torchrun starts them: they learn, and both the same."""

from __future__ import annotations

import re
from pathlib import Path

from launch import run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_data_parallel_and_sharded_are_the_same_training(tmp_path):
    losses = []
    for name in ("ddp", "fsdp"):
        codes, printed = run(EXAMPLES / f"{name}.py", str(tmp_path / name))
        assert codes == [0, 0], printed
        losses.append([float(x) for x in re.findall(r"epoch \d: loss ([\d.]+)", printed)])
    assert len(losses[0]) == 10 and losses[0][-1] < 0.6 * losses[0][0]
    # Printed to four digits; float32 sums are taken in another order.
    assert all(abs(a - b) <= 2e-4 for a, b in zip(*losses, strict=True)), losses
    assert (tmp_path / "fsdp" / ".metadata").exists()
