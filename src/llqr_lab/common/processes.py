"""Many independent runs in processes of one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

import torch

__all__ = ["available_workers", "one_thread", "run_all"]

Job = TypeVar("Job")
Result = TypeVar("Result")


def available_workers() -> int:
    """Return how many processes to use: one per core that this process may use, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, cores or 1))


def run_all(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    label: str,
    done: Callable[[int, Result], None] = lambda index, result: None,
) -> list[Result]:
    """Return the function's result for each job, with a progress bar on a terminal.

    Every process computes with one thread, so that results do not depend on ``workers``.

    Args:
        function: picklable, if there is more than one process.
        jobs: its arguments.
        workers: number of processes; 1: this one.
        label: of the bar.
        done: called in this process with a job's index and result as soon as it is there.
    """
    from tqdm import tqdm

    results: dict[int, Result] = {}
    # disable=None: no bar where nobody watches, such as in a log file.
    with tqdm(total=len(jobs), desc=label, unit="run", disable=None, leave=False) as bar:
        for index, result in _results_as_they_come(function, jobs, workers):
            results[index] = result
            done(index, result)
            bar.update()
    return [results[index] for index in range(len(jobs))]


def _results_as_they_come(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    if workers == 1:
        for index, job in enumerate(jobs):
            with one_thread():
                result = function(job)
            yield index, result
        return
    # New interpreters: a fork would copy torch's thread pool in an unknown state.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        indices = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        try:
            for future in as_completed(indices):
                yield indices[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as in the processes of :func:`run_all`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
