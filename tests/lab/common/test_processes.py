"""Runs in processes: in the order of the jobs, and what a failure leaves."""

import pytest
import torch

from llqr_lab.common.processes import run_all


def test_results_come_in_the_order_of_the_jobs_and_are_told_one_by_one():
    told = []
    threads = torch.get_num_threads()
    found = run_all(abs, [-3, 2, -1], 1, "test", lambda i, result: told.append((i, result)))
    assert found == [3, 2, 1] and told == [(0, 3), (1, 2), (2, 1)]
    assert torch.get_num_threads() == threads


def test_what_was_done_before_a_failure_has_been_told():
    told = []
    with pytest.raises(TypeError):
        run_all(abs, [-3, "x", -1], 1, "test", lambda i, result: told.append(result))
    assert told == [3]
