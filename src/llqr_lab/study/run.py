"""A study from beginning to end: costs, tuning and results, problem by problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..common.processes import run_all
from ..recipes.draws import seed_of
from ..recipes.halving import FIRST_SEED
from .costs import in_units, measure_costs, steps_within
from .journal import Journal
from .methods import Range
from .plan import READINGS, STUDIES, Effort, Study
from .problems import PROBLEMS, Problem, Size
from .training import Device, Run, train
from .tuning import search

__all__ = [
    "Setup",
    "costs_of",
    "final_runs",
    "lengths_of",
    "make_setup",
    "run_study",
    "tuned_of",
]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """A study at a scale, with the problems and methods that were chosen.

    Attributes:
        name: of the study.
        scale: of its problems and effort.
        problems: names.
        methods: names.
        out: folder of the journal.
        device: where to compute.
    """

    name: str
    scale: str
    problems: Sequence[str]
    methods: Sequence[str]
    out: Path
    device: Device = Device()

    @property
    def study(self) -> Study:
        """The row of the study."""
        return STUDIES[self.name]

    @property
    def effort(self) -> Effort:
        """What it spends."""
        return self.study.efforts[self.scale]

    def tuning_of(self, problem: str) -> int:
        """Return how many settings each method tries on a problem."""
        return self.effort.tuning * (2 if PROBLEMS[problem].search_decay else 1)

    def runs_of_a_method(self, problem: str) -> int:
        """Return how many runs a method has on a problem."""
        effort = self.effort
        return self.tuning_of(problem) * effort.tuning_seeds + len(READINGS) * effort.seeds

    def ranges(self, problem: str, method: str) -> dict[str, Range]:
        """Return where the settings of a method are searched on a problem."""
        row = PROBLEMS[problem]
        return self.study.methods[method].ranges(row.rates, decay=row.search_decay)

    def size(self, problem: str) -> Size:
        """Return the sizes of a problem."""
        return PROBLEMS[problem].sizes[self.scale]

    def journal(self, problem: str) -> Journal:
        """Return the journal of a problem."""
        return Journal(self.out / f"{self.name}-{self.scale}" / problem)

    def key_of(self, run: Run) -> dict[str, Any]:
        """Return what identifies a run: all that it depends on but the code."""
        return {**asdict(run), **self.conditions(run.problem, run.method)}

    def conditions(self, problem: str, method: str) -> dict[str, Any]:
        """Return what the runs of a method on a problem have in common."""
        row = PROBLEMS[problem]
        return {
            "method": method,
            "row": str(self.study.methods[method]),
            "size": self.size(problem).plain(),
            "noise": row.noise,
            "augment": row.augment,
            "device": list(self.device),
        }


def make_setup(
    name: str,
    scale: str,
    problems: Sequence[str] | None,
    methods: Sequence[str] | None,
    out: Path,
    device: Device | None = None,
) -> Setup:
    """Return a study at a scale.

    Methods whose package is not installed are left out, unless they were asked for.

    Raises:
        ValueError: there is no such problem or method, or its package is not installed.
    """
    study = STUDIES[name]
    known = study.methods
    for what, names, table in (("problems", problems, PROBLEMS), ("methods", methods, known)):
        for wrong in [n for n in names or () if n not in table]:
            raise ValueError(f"{what}: expected some of {', '.join(table)}; got {wrong!r}")
    needs = {m: known[m].base_row.missing for m in methods or ()}
    if missing := [f"{method} needs {what}" for method, what in needs.items() if what]:
        raise ValueError(f"methods: {'; '.join(missing)}")
    chosen = methods or [m for m in study.chosen.get(scale, known) if not known[m].base_row.missing]
    # What differences are taken to belongs to every study; the table's order is that of the page.
    wanted = {*chosen, *study.baselines}
    return Setup(
        name,
        scale,
        problems or study.problems[scale],
        [m for m in known if m in wanted],
        out,
        device or (Device() if scale == "smoke" else study.device),
    )


def run_study(setup: Setup, workers: int, say: Say = print) -> None:
    """Make all runs that the journal does not have.

    Args:
        setup: the study.
        workers: processes of one thread each; an accelerator has one.
        say: gets a line whenever something is done.
    """
    workers = workers if setup.device.name == "cpu" else 1
    of_methods = sum(map(setup.runs_of_a_method, setup.problems))
    progress = _Progress(of_methods * len(setup.methods), say)
    for name in setup.problems:
        progress.say(f"{name}: what steps cost")
        for unit in (_measure, _tune, _finish):
            tasks = list(_tasks_of(setup, name, unit, progress.say))
            each = 1 if unit is _measure else workers
            run_all(
                unit, tasks, min(each, max(1, len(tasks))), name,
                done=lambda i, result, tasks=tasks: progress.add(tasks[i], result),
            )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """What a process gets: names only, since the tables hold functions."""

    setup: Setup
    problem: str
    method: str = ""
    runs: Sequence[Run] = ()

    @property
    def row(self) -> Problem:
        return PROBLEMS[self.problem]

    def make(self, run: Run, journal: Journal) -> dict[str, Any]:
        """Return the record of a run."""
        setup, method = self.setup, self.setup.study.methods[run.method]
        size = setup.size(self.problem)
        found: dict[str, Any] = journal.keep(
            "runs", setup.key_of(run), lambda: train(run, self.row, size, method, setup.device)
        )
        return found


def costs_of(setup: Setup, problem: str) -> dict[str, Any]:
    """Return what steps cost, of the methods of which it is known."""
    journal = setup.journal(problem)
    found = {m: journal.read("costs", setup.conditions(problem, m)) for m in setup.methods}
    return {method: cost for method, cost in found.items() if cost is not None}


def lengths_of(setup: Setup, problem: str, costs: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the steps of each method in each reading; a method that failed has none.

    The budget of a reading at equal seconds is what SAM (the first baseline) takes for the steps of
    the problem.
    """
    steps = setup.size(problem).steps
    reference = costs[setup.study.baselines[0]]
    if not reference["steps"]:
        raise RuntimeError(f"{setup.study.baselines[0]} on {problem}: {reference['error']}")
    budget = reference["seconds"][-1]
    return {
        method: {"steps": steps, "seconds": steps_within(cost, budget)}
        for method, cost in costs.items()
        if cost["steps"]
    }


def tuned_of(setup: Setup, problem: str, method: str) -> dict[str, Any] | None:
    """Return the search of a method, or None if it has not ended."""
    found: dict[str, Any] | None = setup.journal(problem).read(
        "tuned", _tuned_key(setup, problem, method)
    )
    return found


def _tuned_key(setup: Setup, problem: str, method: str) -> dict[str, Any]:
    effort = setup.effort
    ranges = setup.ranges(problem, method)
    return {
        **setup.conditions(problem, method),
        "ranges": {name: [r.low, r.start, r.high] for name, r in ranges.items()},
        "runs": setup.tuning_of(problem),
        "seeds": effort.tuning_seeds,
    }


def final_runs(setup: Setup, problem: str, method: str) -> dict[str, list[Run]]:
    """Return the runs of the results, by reading; none before the search has ended."""
    costs, tuned = costs_of(setup, problem), tuned_of(setup, problem, method)
    if method not in costs or tuned is None:
        return {}
    lengths = lengths_of(setup, problem, costs)[method]
    run = Run(problem, method, tuned["settings"], 0, 0, "test")
    return {
        reading: [replace(run, seed=s, steps=lengths[reading]) for s in range(setup.effort.seeds)]
        for reading in READINGS
    }


def _tasks_of(setup: Setup, problem: str, unit: Any, say: Say) -> Iterable[_Task]:
    """Yield what there is to do for a problem: one process's work each."""
    if unit is _measure:
        yield _Task(setup, problem)
        return
    costs = costs_of(setup, problem)
    lengths = lengths_of(setup, problem, costs)
    if unit is _tune:
        for method in setup.methods:
            if method in lengths:
                yield _Task(setup, problem, method)
            else:
                say(f"{problem}, {method}: failed: {costs[method]['error']}")
        return
    for method in lengths:
        # A method whose readings have the same number of steps has the same runs in both.
        readings = final_runs(setup, problem, method)
        for runs in {tuple(r.steps for r in runs): runs for runs in readings.values()}.values():
            yield from (_Task(setup, problem, method, (run,)) for run in runs)


def _measure(task: _Task) -> tuple[str, int]:
    """Time the methods that have not been timed, beside the first baseline.

    If the baseline was timed before, with other methods, its seconds then are the unit: another
    hour of the machine changes no comparison.
    """
    setup, journal = task.setup, task.setup.journal(task.problem)
    known, reference = costs_of(setup, task.problem), setup.study.baselines[0]
    missing = [m for m in setup.methods if m not in known]
    if not missing:
        return "costs are known", 0
    methods = {m: setup.study.methods[m] for m in setup.methods if m in {*missing, reference}}
    size, rounds = setup.size(task.problem), setup.effort.rounds
    costs = measure_costs(task.row, size, methods, setup.device, rounds)
    if reference in known:
        factor = known[reference]["seconds"][-1] / costs[reference]["seconds"][-1]
        costs = {m: in_units(cost, factor) for m, cost in costs.items()}
    for method in missing:
        cost = costs[method]
        journal.keep("costs", setup.conditions(task.problem, method), lambda cost=cost: cost)
    return "costs are measured", 0


def _tune(task: _Task) -> tuple[str, int]:
    """Search the settings of a method at equal seconds."""
    setup, problem, method = task.setup, task.problem, task.method
    journal, effort = setup.journal(problem), setup.effort
    costs = costs_of(setup, problem)
    steps = lengths_of(setup, problem, costs)[method]["seconds"]
    ranges = setup.ranges(problem, method)

    def score(settings: dict[str, float]) -> float | None:
        seeds = range(FIRST_SEED, FIRST_SEED + effort.tuning_seeds)
        runs = [Run(problem, method, settings, seed, steps, "validation") for seed in seeds]
        metrics = [task.make(run, journal)["metric"] for run in runs]
        if any(m is None for m in metrics):
            return None
        return task.row.sign * sum(metrics) / len(metrics)

    seed = seed_of(0, "tuning") % 2**31  # of the sampler; methods share its draws
    found = journal.keep(
        "tuned",
        _tuned_key(setup, problem, method),
        lambda: search(ranges, setup.tuning_of(problem), score, seed),
    )
    settings = ", ".join(f"{name} {value:g}" for name, value in found["settings"].items())
    return f"tuned, {settings}", max(0, journal.made - 1)


def _finish(task: _Task) -> tuple[str, int]:
    journal = task.setup.journal(task.problem)
    (run,) = task.runs
    record = task.make(run, journal)
    said = {"finished": f"{task.row.metric} {record['metric'] or 0.0:.4g}"}
    return f"seed {run.seed}, {said.get(record['ended'], record['ended'])}", journal.made


class _Progress:
    """Say what is done, and about when the rest will be."""

    def __init__(self, runs: int, say: Say) -> None:
        self._runs, self.say = runs, say
        self._done = self._made = 0
        self._began = time.monotonic()

    def add(self, task: _Task, result: tuple[str, int]) -> None:
        setup, (said, made) = task.setup, result
        effort = setup.effort
        if not task.method:
            return self.say(f"{task.problem}: {said}")
        costs = costs_of(setup, task.problem)
        if task.runs:
            lengths = lengths_of(setup, task.problem, costs)[task.method]
            self._done += 2 if lengths["steps"] == lengths["seconds"] else 1
        else:
            self._done += setup.tuning_of(task.problem) * effort.tuning_seeds
        self._made += made
        minutes = (time.monotonic() - self._began) / 60
        left = ""
        if self._made and self._done < self._runs:
            left = f", about {minutes / self._made * (self._runs - self._done):.0f} min left"
        self.say(
            f"{task.problem}, {task.method}: {said} "
            f"[{self._done} of {self._runs} runs, {minutes:.1f} min{left}]"
        )
