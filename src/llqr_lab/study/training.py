"""One run: a network under a method, one step at a time, looked at on a coarse grid of steps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import llqr

from ..recipes.draws import generator_for
from .data import Examples
from .methods import Method
from .metrics import METRICS, MetricName
from .problems import Problem, Size

__all__ = ["GRID", "Device", "Run", "Training", "rate_factor", "train"]

GRID = 8  # points of the curve of a result, beside its beginning; a run of a search has one
WARM = 0.05  # share of the steps in which the learning rate rises
CHUNK = 500  # examples of a forward without gradients


class Device(NamedTuple):
    """Where a study computes.

    Attributes:
        name: as torch knows it.
        bfloat16: whether forwards run under autocast.
    """

    name: str = "cpu"
    bfloat16: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward."""
        return torch.autocast(self.name, torch.bfloat16) if self.bfloat16 else nullcontext()

    def seconds(self) -> float:
        """Return a clock: of the processor for one thread of it, else of the wall."""
        if self.name == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Run:
    """What identifies a run.

    Attributes:
        problem: its name.
        method: its name.
        settings: learning rate, and radius if there is a probe.
        seed: of the data, the weights and the batches.
        steps: the learning rate has fallen to zero after them.
        part: "validation" or "test", which the metric is measured on.
    """

    problem: str
    method: str
    settings: Mapping[str, float]
    seed: int
    steps: int
    part: str


def rate_factor(step: int, steps: int, *, own_schedule: bool = False) -> float:
    """Return the learning rate over its largest: it rises in a line and falls along a cosine.

    Example:
        >>> [round(rate_factor(k, 40), 2) for k in (0, 1, 20, 40)]
        [0.5, 1.0, 0.5, 0.0]
    """
    warm = max(1, round(WARM * steps))
    rising = min(1.0, (step + 1) / warm)
    return rising if own_schedule else rising * (1 + math.cos(math.pi * step / steps)) / 2


class Training:
    """A network under a method, on the data of a seed.

    Args:
        problem: its row.
        size: of the problem.
        method: its row.
        settings: what was searched.
        seed: of the run.
        steps: of the run.
        device: where to compute.
    """

    def __init__(
        self,
        problem: Problem,
        size: Size,
        method: Method,
        settings: Mapping[str, float],
        seed: int,
        steps: int,
        device: Device,
    ) -> None:
        """Make the network, the data and the optimizer."""
        self.problem, self.size, self.seed, self.steps = problem, size, seed, steps
        self.device = device
        self.network = problem.network(size, seed).to(device.name)
        self.data = problem.data(size, seed, torch.device(device.name))
        self.optimizer = method.optimizer(self.network, settings)
        self.own_schedule = method.base_row.own_schedule
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._step, self._order = 0, torch.empty(0, dtype=torch.long)
        self._set_training(True)

    def step(self) -> None:
        """Take one step."""
        factor = rate_factor(self._step, self.steps, own_schedule=self.own_schedule)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        forward = self._forward_of(self._next_batch())
        if isinstance(self.optimizer, llqr.Optimizer):
            self.optimizer.minimize(forward)
        else:
            self.optimizer.zero_grad()
            forward()[0].backward()
            self.optimizer.step()
        self._step += 1

    def _next_batch(self) -> Examples:
        """Return the examples of the step, which depend only on the seed and the step."""
        count, batch = len(self.data.train.inputs), self.size.batch
        epoch, number = divmod(self._step, max(1, count // batch))
        if number == 0:
            draws = generator_for(self.seed, "order", epoch)
            self._order = torch.randperm(count, generator=draws).to(self.device.name)
        rows = self._order[number * batch : (number + 1) * batch]
        return self.problem.augmented(self.data.train.at(rows), self.seed, self._step)

    def _forward_of(self, batch: Examples) -> Callable[[], tuple[Tensor, Tensor]]:
        def forward() -> tuple[Tensor, Tensor]:
            with self.device.autocast():
                outputs = self.network(batch.inputs)
            return self.problem.kind.loss(outputs.float(), batch.targets), outputs

        return forward

    def _set_training(self, training: bool) -> None:
        """Let a base that averages its weights show those it trains, or their average."""
        if self.own_schedule:
            getattr(self.optimizer, "train" if training else "eval")()

    def look(self, part: str) -> tuple[float, float]:
        """Return the training loss and the metric of a few examples, in evaluation mode."""
        network = self._shown_network()

        def measure(part: str, metric: MetricName) -> float:
            few = getattr(self.data, part).at(slice(METRICS[metric].glance))
            return self._mean(network, few, metric)

        return measure("train", "loss"), measure(part, self.problem.metric)

    def result(self, part: str) -> float:
        """Return the metric of all examples of a part, "validation" or "test"."""
        return self._mean(self._shown_network(), getattr(self.data, part), self.problem.metric)

    def _shown_network(self) -> nn.Module:
        """Return a copy to evaluate; averaged weights get statistics of their own in norms."""
        weights = deepcopy(self.network.state_dict())
        self._set_training(False)
        network = deepcopy(self.network)
        if self.own_schedule:
            # There and back again rounds: what is trained shall not depend on being looked at.
            self._set_training(True)
            self.network.load_state_dict(weights)
            batches = self.data.train.inputs[: 20 * self.size.batch].split(CHUNK)
            torch.optim.swa_utils.update_bn(batches, network)
        return network.eval()

    @torch.no_grad()
    def _mean(self, network: nn.Module, examples: Examples, what: str) -> float:
        if what == "bleu":
            return self.problem.bleu(self.size, network, examples)
        total = 0.0
        for x, y in zip(*(part.split(CHUNK) for part in examples), strict=True):
            with self.device.autocast():
                outputs = network(x).float()
            if what == "accuracy":
                total += 100 * float((outputs.argmax(-1) == y).sum())
            else:
                total += len(x) * float(self.problem.kind.loss(outputs, y))
        return total / len(examples.inputs)


def train(run: Run, problem: Problem, size: Size, method: Method, device: Device) -> dict[str, Any]:
    """Make a run and return its record; one that fails or diverges says so and raises nothing.

    The record has ``curve``, a list of [step, training loss, metric] of a few examples, and
    ``metric``, of all examples at the end. A metric is not worse than that of the untrained network
    on a few, which is also what a run counts as that diverged or failed (None if it failed before).
    """
    curve: list[list[float]] = []
    record: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            record = _train(run, problem, size, method, device, curve)
        except Exception as error:  # a run that fails must not end a study of hours
            record = {"ended": "failed", "error": f"{type(error).__name__}: {error}"[:300]}
    metric = record.pop("metric", None)
    untrained = curve[0][2] if curve else None
    if metric is None or problem.sign * (metric - untrained) < 0:
        metric = untrained
    rounded = [[step, *(float(f"{v:.6g}") for v in seen)] for step, *seen in curve]
    return {**record, "curve": rounded, "metric": metric}


def _train(
    run: Run, problem: Problem, size: Size, method: Method, device: Device, curve: list[Any]
) -> dict[str, Any]:
    """Train until the end or until a loss is not finite; fill in the curve."""
    training = Training(problem, size, method, run.settings, run.seed, run.steps, device)
    curve.append([0, *training.look(run.part)])
    points = 1 if run.part == "validation" else GRID
    marks = sorted({math.ceil(run.steps * i / points) for i in range(1, points + 1)})
    seconds = 0.0
    for begin, end in zip([0, *marks], marks):  # noqa: B905
        began = device.seconds()
        for _ in range(end - begin):
            training.step()
        seconds += device.seconds() - began
        seen = training.look(run.part)
        if not all(map(math.isfinite, seen)):
            return {"ended": "diverged", "seconds": round(seconds, 3)}
        curve.append([end, *seen])
    metric = training.result(run.part)
    return {"ended": "finished", "seconds": round(seconds, 3), "metric": metric}
