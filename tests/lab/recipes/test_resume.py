"""A run that was killed ends as one that was not: weights and measurements, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from llqr_lab.cli import main
from llqr_lab.recipes.records import kept_networks


def ended(folder):
    """Return the weights and what was measured, without times."""
    (path,) = folder.rglob("result.json")
    result = json.loads(path.read_text())
    for entry in (*result["epochs"], *result["refreshes"]):
        del entry["seconds"]
        entry.pop("processor_seconds", None)
        entry.pop("elapsed_seconds", None)
    lines = [json.loads(x) for x in (path.parent / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.pop("processor_seconds", None)
        line.pop("elapsed_seconds", None)
    weights = torch.load(path.parent / "network.pt", weights_only=True)
    return weights, result["epochs"], result["refreshes"], lines


def equal(a, b):
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])


@pytest.mark.parametrize(
    "recipe, method",
    [
        ("table1", "llqr-sam"),
        ("table4", "llqr-f-sam"),
        ("table6", "llqr-sam"),
        ("demo", "llqr-sam"),
        ("demo", "gm-sam-5"),
    ],
)
def test_after_an_error_at_any_step(tmp_path, monkeypatch, recipe, method):
    from llqr_lab.recipes import loop

    settings = [recipe, f"method={method}", "scale=smoke", "tracker=none", "log_every=1"]
    settings += ["keep_every=1"]
    monkeypatch.chdir(tmp_path)
    assert main(["run", *settings, "out=whole"]) == 0
    real = loop.Training.take_step

    def failing_at(stop):
        def failing(self, batch):
            if self.step == stop:
                raise RuntimeError("stopped here")
            return real(self, batch)

        return failing

    for stop in (1, 3):
        monkeypatch.setattr(loop.Training, "take_step", failing_at(stop))
        with pytest.raises(RuntimeError, match="stopped here"):
            main(["run", *settings, "out=broken", "checkpoint_every=1"])
        monkeypatch.setattr(loop.Training, "take_step", real)
        assert list((tmp_path / "broken").rglob("checkpoint.pt"))
    assert main(["run", *settings, "out=broken", "checkpoint_every=2"]) == 0
    equal(ended(tmp_path / "broken"), ended(tmp_path / "whole"))
    (path,) = (tmp_path / "broken").rglob("network.pt")
    kept = kept_networks(path.parent)
    assert list(kept) == [epoch["epoch"] for epoch in ended(tmp_path / "whole")[1]]
    last, final = (torch.load(p, weights_only=True) for p in (kept[max(kept)], path))
    assert all(torch.equal(last[k], v) for k, v in final.items())


@pytest.mark.slow
def test_after_kill_9_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    settings = ["table1", "model=resnet18", "method=llqr-sam", "scale=small", "train.epochs=2"]
    settings += ["llqr.every=10", "log_every=1", "checkpoint_every=5"]
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "llqr_lab.cli", "run", *settings, "out=killed"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (lines := list(tmp_path.rglob("metrics.jsonl"))) or (
            len(lines[0].read_text().splitlines()) < 12
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.rglob("result.json"))
    assert main(["run", *settings, "out=killed"]) == 0
    assert main(["run", *settings, "out=whole"]) == 0
    equal(ended(tmp_path / "killed"), ended(tmp_path / "whole"))


def test_an_unfinished_run_with_other_settings_is_refused(tmp_path, monkeypatch, capfd):
    from llqr_lab.recipes import config, loop

    monkeypatch.chdir(tmp_path)
    settings = ["table1", "method=sam", "scale=smoke", "tracker=none"]

    def stopping(self, bar):
        self.records.save_checkpoint(self.checkpoint_state())
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_train_epoch", stopping)
        with pytest.raises(RuntimeError, match="stopped here"):
            main(["run", *settings])
    # As if the protocol had changed since.
    real = config.flat_settings
    monkeypatch.setattr(loop, "flat_settings", lambda c: {**real(c), "base.lr": 7.0})
    assert main(["run", *settings]) != 0
    assert "unfinished run whose base.lr differ" in capfd.readouterr().err
