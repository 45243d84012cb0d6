"""What a study would take, from a few steps of its first baseline."""

from __future__ import annotations

from ..common.processes import one_thread
from .plan import READINGS
from .problems import PROBLEMS
from .run import Setup
from .training import Training

__all__ = ["estimate_lines"]

STEPS = 12
OTHERS = 1.1  # seconds of a method's steps over the baseline's, in the mean of a table
LOOKS = 1.1  # seconds with the evaluations over those without


def estimate_lines(setup: Setup) -> list[str]:
    """Return a line per problem and the total; a few steps are taken to know it."""
    effort, total, lines = setup.effort, 0.0, []
    row = setup.study.methods[setup.study.baselines[0]]
    for name in setup.problems:
        problem, size = PROBLEMS[name], setup.size(name)
        settings = {n: r.start for n, r in setup.ranges(name, setup.study.baselines[0]).items()}
        training = Training(problem, size, row, settings, 0, STEPS + 3, setup.device)
        with one_thread():
            for _ in range(3):
                training.step()
            began = setup.device.seconds()
            for _ in range(STEPS):
                training.step()
            budget = size.steps * (setup.device.seconds() - began) / STEPS
        fixed = setup.tuning_of(name) * effort.tuning_seeds + effort.seeds  # at equal seconds
        count = len(setup.methods)
        stepwise = OTHERS * (effort.seeds + effort.rounds)
        seconds = count * budget * LOOKS * (fixed + stepwise)
        total += seconds
        runs = count * setup.runs_of_a_method(name)
        lines.append(f"{name}: {runs} runs, {budget:.1f} s each, {seconds:.0f} s")
    lines.append(
        f"{setup.name} at scale {setup.scale}: {len(setup.methods)} methods x {effort.tuning} "
        f"settings and {effort.seeds} seeds in {len(READINGS)} readings: about {total:.0f} seconds "
        f"of one processor, {_duration(total)}"
    )
    return lines


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{60 * hours:.0f} minutes" if hours < 3 else f"{hours:,.0f} hours"
