"""benchmarks/accelerator.py in small: what it writes, and that failures show and stop nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_run_on_the_cpu_writes_every_check(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--device", "cpu", "--reduced"]
    command += ["--only", "parity,extras", "--match", "mlp", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "accelerator.json").read_text())
    assert result == json.loads(done.stdout.splitlines()[0])
    assert result["machine"]["device"] == "cpu"
    assert {row["part"] for row in result["rows"]} == {"parity", "extras"}
    products = [row for row in result["rows"] if row["name"].startswith("products")]
    assert len(products) == 4
    assert all(row["status"] == "ok" and row["value"] <= row["bound"] for row in products)
    assert sum(result["counts"].values()) == len(result["rows"])


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accelerator
    import accelerator_parts._report as reports

    yield accelerator, reports
    for name in [n for n in sys.modules if n.startswith("accelerator")]:
        del sys.modules[name]


def fail():
    raise KeyError("no such weight")


def test_what_fails_is_a_row_and_the_rest_runs(tmp_path, scripts):
    accelerator, reports = scripts
    log = tmp_path / "log"
    report = reports.Report("a part", log, budget=60, device="cpu", reduced=True)

    def absent():
        raise reports.Unsupported("llqr has no such thing")

    report.check("raises: a", fail, 1.0)
    report.check("too large: b", lambda: 2.0, 1.0)
    report.check("no number: c", lambda: float("nan"), 1.0)
    report.check("no number: d", lambda: float("inf"))
    report.check("absent: e", absent, 1.0)
    report.check("measured: f", lambda: (3.0, "a note"))
    report.check("right: g", lambda: 1.0, 1.0)
    with log.open("a") as file:
        file.write('{"part": "cut off')
    result = accelerator.summary(accelerator.read(log))
    found = [row["status"] for row in result["rows"]]
    assert found == ["failed"] * 4 + ["skipped", "measured", "ok"]
    assert result["counts"] == {"failed": 4, "skipped": 1, "measured": 1, "ok": 1}
    assert "KeyError: 'no such weight'" in result["rows"][0]["error"]
    assert "test_accelerator_script.py" in result["rows"][0]["error"]
    shown = accelerator.table(result["rows"])
    for text in ("nan is not within 1.0", "a note", "1 ok", "1 skipped", "no such weight"):
        assert text in shown


def test_a_part_ends_with_its_time(tmp_path, scripts):
    accelerator, reports = scripts
    log = tmp_path / "log"
    report = reports.Report("a part", log, budget=0.1, device="cpu", reduced=True)
    began = time.monotonic()
    report.check("slow: a", lambda: time.sleep(30), 1.0)
    report.check("late: b", lambda: 0.0, 1.0)
    assert time.monotonic() - began < 15
    first, second = accelerator.read(log)
    assert first["status"] == second["status"] == "failed"
    assert "ended within" in first["error"] and "not run" in second["error"]


def test_a_part_that_crashes_is_a_failure(tmp_path, scripts, monkeypatch, capsys):
    accelerator, _ = scripts
    run = subprocess.run

    def crash(command, **options):
        return run([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(accelerator.subprocess, "run", crash)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--only", "amp", "--out", str(tmp_path)])
    assert accelerator.main() == 1
    assert "its process ended with status" in capsys.readouterr().out
