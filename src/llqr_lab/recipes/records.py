"""What a run leaves in its folder: settings, one line per measurement, checkpoints, the result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.output import RESULT_FORMAT, without_nan, write_json, write_whole
from .trackers import Tracker, begin_tracker

__all__ = ["Records", "kept_networks"]


class Records:
    """The folder of a run; with several processes only the first one writes.

    Args:
        folder: ``config.json``, ``metrics.jsonl``, ``checkpoint.pt`` and, when the run is
            finished, ``network.pt`` and ``result.json``. None: nothing is written or read.
        writes: whether this process writes.
        tracker: where the measurements are shown as well, one of ``trackers.TRACKERS``.
    """

    def __init__(
        self, folder: Path | None = None, *, writes: bool = True, tracker: str = "none"
    ) -> None:
        """Take note of the folder, which is made by :meth:`begin_files`."""
        self.folder, self.tracker = folder, tracker
        self.lines = 0
        self._tracker: Tracker | None = None
        self._written = folder if writes else None

    def begin_files(self, config: Mapping[str, Any], step: int = 0, lines: int = 0) -> None:
        """Make the folder, write the settings; forget what came after the checkpoint.

        Args:
            config: of the run.
            step: of the checkpoint.
            lines: of metrics.jsonl when it was written.
        """
        if (folder := self._written) is None:
            return
        write_json(folder / "config.json", config)
        metrics = folder / "metrics.jsonl"
        # What came after the checkpoint is measured again.
        kept = metrics.read_text().splitlines(keepends=True)[:lines] if lines else []
        write_whole(metrics, "".join(kept))
        self.lines = len(kept)
        self._tracker = begin_tracker(self.tracker, folder, config, step)

    def write_measurement(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a measurement: a line of metrics.jsonl, and points of the tracker's curves."""
        if (folder := self._written) is None:
            return
        line = json.dumps({"kind": kind, "step": step, **without_nan(values)}, allow_nan=False)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.lines += 1
        if self._tracker is not None:
            numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
            self._tracker.log({f"{kind}/{name}": value for name, value in numbers.items()}, step)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; an old one stays whole until the new one is."""
        if (folder := self._written) is not None:
            new = folder / "checkpoint.pt.new"
            torch.save(dict(state), new)
            os.replace(new, folder / "checkpoint.pt")

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """Return the checkpoint, if there is one."""
        path = self.folder and self.folder / "checkpoint.pt"
        if path is None or not path.exists():
            return None
        return torch.load(path, map_location=device, weights_only=True)

    def keep_network(self, weights: Mapping[str, Any], epoch: int | None = None) -> None:
        """Write the trained network, or that after an epoch."""
        if (folder := self._written) is not None:
            path = folder / ("network.pt" if epoch is None else f"networks/epoch-{epoch:04}.pt")
            path.parent.mkdir(exist_ok=True)
            torch.save(dict(weights), path)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write the result; the checkpoint is no longer needed."""
        if (folder := self._written) is None:
            return
        write_json(folder / "result.json", {"format": RESULT_FORMAT, **result})
        (folder / "checkpoint.pt").unlink(missing_ok=True)

    def close(self) -> None:
        """Close what is open."""
        if self._tracker is not None:
            self._tracker.close()

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        path = self.folder and self.folder / "result.json"
        return json.loads(path.read_text()) if path is not None and path.exists() else None


def kept_networks(folder: Path) -> dict[int, Path]:
    """Return the files of the networks that a run has kept, by epoch."""
    paths = sorted((folder / "networks").glob("epoch-*.pt"))
    return {int(path.stem.partition("-")[2]): path for path in paths}
