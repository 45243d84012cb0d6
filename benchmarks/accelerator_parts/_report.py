"""Checks and measurements that fail one by one, and are written one by one."""

from __future__ import annotations

import gc
import json
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["OverTime", "Report", "Unsupported"]


class OverTime(Exception):
    """The part's time is over."""


class Unsupported(Exception):
    """This version of the library does not have what a check is about."""


class Report:
    """Where the results of a part go.

    Args:
        part: its name.
        log: a row of JSON per line is appended here.
        budget: seconds for all checks together.
        device: "cuda" or "cpu".
        reduced: whether sizes are tiny.
        match: checks whose name does not contain this are left out.
    """

    def __init__(
        self, part: str, log: Path, *, budget: float, device: str, reduced: bool, match: str = ""
    ) -> None:
        self.part, self.log, self.device, self.reduced = part, log, device, reduced
        self.match, self.end = match, time.monotonic() + budget

    def check(self, name: str, run: Callable[[], Any], bound: float | None = None) -> None:
        """Run a check and write its row.

        Args:
            name: "group: case".
            run: returns the value, or (value, note).
            bound: the largest value that passes; None: a measurement.
        """
        if self.match not in name:
            return
        row: dict[str, Any] = {"part": self.part, "name": name}
        began = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value, note = self._run_in_time(run)
            row["value"], row["bound"] = value, bound
            if note:
                row["note"] = note
            # A NaN passes no bound.
            passed = math.isfinite(value) if bound is None else value <= bound
            row["status"] = "failed" if not passed else "measured" if bound is None else "ok"
            if caught:
                row["warnings"] = sorted({str(w.message)[:200] for w in caught})
        except Unsupported as error:
            row |= {"status": "skipped", "error": str(error)}
        except Exception as error:
            row |= {"status": "failed", "error": describe(error)}
        row["seconds"] = round(time.monotonic() - began, 3)
        self.write(row)
        if row["seconds"] > 0.5:  # what the check left in circles, as an error's traceback does
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _run_in_time(self, run: Callable[[], Any]) -> tuple[float, str]:
        left = self.end - time.monotonic()
        if left <= 0:
            raise OverTime("not run: the part's time is over")
        signal.signal(signal.SIGALRM, _raise_over_time)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            result = run()
            if self.device == "cuda":
                torch.cuda.synchronize()  # errors of kernels belong to the check that started them
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        value, note = result if isinstance(result, tuple) else (result, "")
        return float(value), note

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the log, and a short line to stderr."""
        with self.log.open("a") as file:
            # JSON has no NaN.
            finite = {
                k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            file.write(json.dumps(finite) + "\n")
        if "name" in row:
            value = f" {row['value']:.3g}" if "value" in row else ""
            line = f"{row['part']} | {row['name']} | {row['status']}{value} {row.get('error', '')}"
            print(line, file=sys.stderr, flush=True)


def _raise_over_time(*_: Any) -> None:
    raise OverTime("the part's time ended within this check")


def describe(error: BaseException) -> str:
    """Return the error's text with the last places that it came through."""
    places = traceback.extract_tb(error.__traceback__)[-4:]
    trace = " < ".join(f"{Path(p.filename).name}:{p.lineno} {p.name}" for p in reversed(places))
    return f"{type(error).__name__}: {str(error)[:400]} [{trace}]"
