"""Where a run's curves are shown: TensorBoard, Weights & Biases, Trackio, MLflow, or nowhere.

Each is one function that begins (or, after a kill, goes on with) a run there and returns a
:class:`Tracker`. Every measurement of a run comes through it, the reports of refreshes included.
"""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from llqr.integrations import tensorboard

from ..common.output import write_json

__all__ = ["PACKAGES", "TRACKERS", "Tracker", "begin_tracker", "require_tracker"]

PROJECT = "llqr"  # the project or experiment that runs are put into


class Tracker(NamedTuple):
    """A run in a tracker.

    Attributes:
        log: takes {name: number} at a step; steps never go down.
        close: ends the run.
    """

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]


def _begin_tensorboard(folder: Path, about: Mapping[str, Any], step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What came after the checkpoint is measured, and drawn, again.
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    return Tracker(tensorboard(writer), writer.close)


def _begin_wandb(folder: Path, about: Mapping[str, Any], step: int) -> Tracker:
    run_id = _known_id(folder, "wandb", step) or uuid.uuid4().hex[:12]
    _note_id(folder, "wandb", run_id)
    run = importlib.import_module("wandb").init(
        project=PROJECT,
        name=_name_of(folder),
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=_flat(about),
    )
    # What was logged before the kill stays: a resumed run measures the same numbers again.
    return Tracker(lambda numbers, at: run.log(numbers, step=at), run.finish)


def _begin_trackio(folder: Path, about: Mapping[str, Any], step: int) -> Tracker:
    # Trackio knows a run by its name.
    name = _known_id(folder, "trackio", step) or f"{_name_of(folder)} {uuid.uuid4().hex[:6]}"
    _note_id(folder, "trackio", name)
    run = importlib.import_module("trackio").init(
        project=PROJECT, name=name, resume="allow", config=_flat(about)
    )
    return Tracker(lambda numbers, at: run.log(numbers, step=at), run.finish)


def _begin_mlflow(folder: Path, about: Mapping[str, Any], step: int) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    known = _known_id(folder, "mlflow", step)
    run = mlflow.start_run(run_id=known, run_name=_name_of(folder))
    _note_id(folder, "mlflow", run.info.run_id)
    mlflow.log_params(_flat(about))
    return Tracker(lambda numbers, at: mlflow.log_metrics(numbers, step=at), mlflow.end_run)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker | None]] = {
    "tensorboard": _begin_tensorboard,
    "wandb": _begin_wandb,
    "trackio": _begin_trackio,
    "mlflow": _begin_mlflow,
    "none": lambda folder, about, step: None,
}
PACKAGES = ("tensorboard", "wandb", "trackio", "mlflow")


def require_tracker(name: str) -> None:
    """Refuse a tracker that there is not, or that is not installed, before anything is computed.

    Raises:
        ValueError: there is no such tracker.
        ModuleNotFoundError: its package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracker: expected one of {', '.join(TRACKERS)}, got {name!r}")
    if name in PACKAGES and find_spec(name) is None:
        raise ModuleNotFoundError(f"tracker={name}: pip install {name}", name=name)


def begin_tracker(
    name: str, folder: Path, about: Mapping[str, Any], step: int = 0
) -> Tracker | None:
    """Begin a run in a tracker, or go on with it; None if the tracker is ``none``.

    Args:
        name: one of ``TRACKERS``.
        folder: of the run. A file ``tracker.json`` in it remembers the run's name in the tracker.
        about: what the run is.
        step: of the checkpoint that the run goes on from; 0: it begins.
    """
    return TRACKERS[name](folder, about, step)


def _name_of(folder: Path) -> str:
    """Return recipe, scale, data, network, method and seed, as the folder has them."""
    return "/".join(folder.parts[-6:])


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is as one level of names."""
    return {k: v for k, v in about.items() if k != "settings"} | dict(about.get("settings", {}))


def _known_id(folder: Path, tracker: str, step: int) -> str | None:
    """Return the run's name in the tracker; None if it begins."""
    path = folder / "tracker.json"
    if not step or not path.exists():
        return None
    return json.loads(path.read_text()).get(tracker)


def _note_id(folder: Path, tracker: str, run_id: str) -> None:
    write_json(folder / "tracker.json", {tracker: run_id})
