"""The numbers of refreshes and of sharpness, in the loggers that a training already has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch.utils.hooks import RemovableHandle

from ..geometry import RefreshReport
from ..sharpness import Eigenvalues, MSharpness, Trace, WorstCase
from ._micro_batches import find_optimizer

__all__ = ["LogNumbers", "log_refreshes", "numbers_of", "tensorboard"]

#: Take {name: number} at a step.
LogNumbers = Callable[[dict[str, float], int], object]


def numbers_of(result: Any, prefix: str = "llqr/") -> dict[str, float]:
    """Return the numbers of a refresh or of a sharpness measurement, by name, for a logger.

    A refresh gives all numbers of its report that are there; ``accepted`` is 1 or 0. A measurement
    gives ``eigenvalue_1`` and so on, ``trace``, ``worst_case`` or ``m_sharpness``, and its standard
    error with ``_error`` behind.

    Args:
        result: a :class:`llqr.RefreshReport`, or what ``eigenvalues``, ``trace``, ``worst_case`` or
            ``m_sharpness`` of ``llqr.sharpness`` returned.
        prefix: in front of each name; most loggers group names by what stands before a slash.

    Raises:
        TypeError: the result is something else.

    Example:
        >>> import llqr
        >>> from llqr.integrations import numbers_of
        >>> numbers_of(llqr.RefreshReport(step=3, accepted=True, change=0.25))
        {'llqr/accepted': 1.0, 'llqr/change': 0.25}
    """
    numbers = {n: v for n, v in _findings_of(result).items() if isinstance(v, (int, float))}
    return {f"{prefix}{name}": float(number) for name, number in numbers.items()}


def _findings_of(result: Any) -> dict[str, Any]:
    if isinstance(result, RefreshReport):
        report = asdict(result)
        del report["step"]  # loggers have the step apart
        return report
    if isinstance(result, Eigenvalues):
        found: dict[str, Any] = {}
        for i, value in enumerate(result.values.tolist()):
            found[f"eigenvalue_{i + 1}"] = value
            if result.standard_errors is not None:
                found[f"eigenvalue_{i + 1}_error"] = float(result.standard_errors[i])
        return found
    if isinstance(result, Trace):
        return {"trace": result.value, "trace_error": result.standard_error}
    if isinstance(result, WorstCase):
        return {"worst_case": result.rise, "worst_case_error": result.standard_error}
    if isinstance(result, MSharpness):
        return {"m_sharpness": result.rise, "m_sharpness_error": result.standard_error}
    raise TypeError(
        "result: expected a RefreshReport, or what eigenvalues, trace, worst_case or m_sharpness "
        f"of llqr.sharpness returned, got {type(result).__name__}"
    )


def log_refreshes(optimizer: Any, log: LogNumbers, *, prefix: str = "llqr/") -> RemovableHandle:
    """Log the numbers of every refresh: J before and after, change, cosine, eigenvalues, seconds.

    Args:
        optimizer: a llqr.Optimizer, also as a framework has wrapped it.
        log: called with the numbers and the optimizer step after each refresh. ``accelerator.log``,
            ``fabric.log_dict``, ``wandb.log`` and ``mlflow.log_metrics`` are such functions as they
            are; :func:`tensorboard` makes one of a SummaryWriter.
        prefix: as in :func:`numbers_of`.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: there is no llqr.Optimizer in what was given.

    Example:
        >>> import torch, llqr
        >>> from llqr.integrations import log_refreshes
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, geometry=llqr.LLQR("kfac", curvature="newton"))
        >>> _ = log_refreshes(optimizer, lambda numbers, step: print(step, sorted(numbers)[:3]))
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
        0 ['llqr/J_after', 'llqr/J_before', 'llqr/accepted']
    """

    def hook(_optimizer: Any, report: RefreshReport) -> None:
        log(numbers_of(report, prefix), report.step)

    return find_optimizer(optimizer).register_refresh_hook(hook)


def tensorboard(writer: Any) -> LogNumbers:
    """Return the function that writes numbers into a ``SummaryWriter``, one curve each.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter, or anything with its ``add_scalar``.
    """

    def log(numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return log
