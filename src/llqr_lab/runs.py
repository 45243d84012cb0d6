"""Runs of the demo's experiment: one method, one seed; and many of them in processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from .data.digits import digits, generator
from .methods import build
from .models.small_cnn import small_cnn
from .train import History, train

__all__ = ["Run", "available_workers", "run", "run_all"]

EPOCHS, BATCH, REFRESH_BATCH, NOISE = 30, 128, 256, 0.4
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One run: a method at settings, a seed, how long, and what it is evaluated on."""

    method: str
    settings: dict[str, Any]
    seed: int
    epochs: int = EPOCHS
    validation: bool = False


def run(task: Run) -> History:
    """Train the small CNN on the noisy digits.

    Runs with the same seed see the same noise, the same initial weights, the same batches and,
    where they refresh equally often, the same refresh minibatches.
    """
    data = digits(task.seed, noise=NOISE, validation=task.validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(task.seed, "initialisation").initial_seed())
        model = small_cnn()
    optimizer = build(task.method, model, task.settings)
    with warnings.catch_warnings():
        # Both are counted in the history, and shown.
        warnings.filterwarnings("ignore", "a refresh was refused")
        warnings.filterwarnings("ignore", "a step was skipped")
        return train(
            model,
            optimizer,
            data,
            epochs=task.epochs,
            batch=BATCH,
            order=generator(task.seed, "order"),
            refresh_batch=REFRESH_BATCH,
            refresh_order=generator(task.seed, "refresh"),
        )


def available_workers() -> int:
    """Return how many processes to use: one a core that this process may use, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, cores or 1))


def run_all(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, label: str
) -> list[Result]:
    """Return the function's result for each task, with a progress bar on a terminal.

    Every process computes with one thread, so that results do not depend on ``workers``.
    """
    from tqdm import tqdm

    # disable=None: no bar where nobody watches, such as in a log file.
    bar = tqdm(total=len(tasks), desc=label, unit="run", disable=None, leave=False)
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            results = []
            for task in tasks:
                results.append(function(task))
                bar.update()
            return results
        finally:
            torch.set_num_threads(threads)
            bar.close()
    # New interpreters: a fork would copy torch's thread pool in an unknown state.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            futures = [pool.submit(function, task) for task in tasks]
            for _ in as_completed(futures):
                bar.update()
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            bar.close()
