"""The same run in one process and in two."""

import json
import subprocess
import sys

import pytest

from llqr_lab.recipes.draws import generator_for, seed_of
from llqr_lab.recipes.workers import Workers


def test_shares_are_equal_and_leave_out_the_rest():
    workers = Workers("cpu")
    assert workers.is_first and workers.own_part([1, 2, 3]) == [1, 2, 3]
    workers.size = 2
    shares = []
    for workers.rank in (0, 1):
        shares.append(workers.own_part([1, 2, 3, 4, 5]))
    assert shares == [[1, 3], [2, 4]]


def test_draws_differ_by_seed_purpose_and_moment():
    seeds = [seed_of(s, p, m) for s in (0, 1) for p in ("order", "noise") for m in (0, 1)]
    assert len(set(seeds)) == 8 and all(0 <= s < 2**63 for s in seeds)
    assert generator_for(0, "order", 1).initial_seed() == seed_of(0, "order", 1)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """A network without batch statistics, where the mean over processes is that of the batch."""
    settings = ["run", "table6", "method=llqr-sam", "scale=smoke", "network.dropout=0"]
    settings += ["tracker=none", "llqr.structure=diagonal"]
    results = []
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", "-m", "llqr_lab.cli", *settings]
        out = tmp_path / str(count)
        subprocess.run([*command, f"out={out}"], check=True, capture_output=True, timeout=300)
        (path,) = out.rglob("result.json")
        results.append(json.loads(path.read_text()))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["validation_loss"] == pytest.approx(a["validation_loss"], rel=1e-4)
