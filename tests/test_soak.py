"""The soak in small: benchmarks/soak.py with a fault of every kind, and one that must show."""

import os
import re
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


def soak(script=SOAK, steps=150, faults=40):
    command = [
        sys.executable,
        "-W",
        "error",
        str(script),
        "--steps",
        str(steps),
        "--faults",
        str(faults),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_faults_leave_no_trace():
    done = soak()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (\w.*?) \| (\d+) \| (\d+) \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert len(rows) == 11
    for kind, planned, injected, survived in rows:
        assert 0 < int(planned) == int(injected) == int(survived), kind
    assert "differences: 0\n" in done.stdout


def test_a_trace_would_be_seen(tmp_path):
    """The same with the masks left to chance after a fault: the ends differ, and it says so."""
    text = SOAK.read_text()
    line = "        torch.manual_seed(step)"
    assert text.count(line) == 1
    script = tmp_path / "soak.py"
    script.write_text(
        text.replace(line, "        torch.rand(1) if step else torch.manual_seed(step)")
    )
    done = soak(script, steps=60, faults=20)
    assert done.returncode == 1
    assert int(re.search(r"^differences: (\d+)$", done.stdout, re.MULTILINE)[1]) > 10
