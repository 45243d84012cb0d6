"""Run a function in a process of its own, within limits, and measure what it took."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Limits", "run_in_process"]

GIB = 2**30
#: How an allocator says that there is no more memory.
NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc")


@dataclass(frozen=True)
class Limits:
    """What a process may take.

    Attributes:
        seconds: of the processor.
        gib: of memory asked for, of which a part may never be touched.
    """

    seconds: int
    gib: float


def run_in_process(function: Callable[[], dict[str, Any]], limits: Limits) -> dict[str, Any]:
    """Return what the function returns, with what it took; it runs in a fork of this process.

    The fork has what is imported here, so it takes no time to start. Threads that run here would be
    missing in it: call this where none does (Linux).

    Args:
        function: returns what JSON can hold.
        limits: of the process; one that exceeds them is ended.

    Returns:
        The function's result with "seconds" (of the processor) and "peak_gib", the largest resident
        memory, and "stopped" (by which limit) or "error" if it has none.
    """
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            _answer_and_leave(function, limits, answer.fileno())
        _, status, used = os.wait4(child, 0)
        answer.seek(0)
        content = answer.read()
    found = json.loads(content) if content else _why_it_ended(status, limits)
    seconds = used.ru_utime + used.ru_stime
    return {**found, "seconds": round(seconds, 1), "peak_gib": round(used.ru_maxrss / 2**20, 3)}


def _answer_and_leave(function: Callable[[], dict[str, Any]], limits: Limits, answer: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
        size = int(limits.gib * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        found = function()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY):
            found = {"stopped": f"above {limits.gib:g} GiB"}
        else:
            traceback.print_exc()
            found = {"error": text}
    os.write(answer, json.dumps(found).encode())
    os._exit(0)  # nothing of the parent's is closed or flushed twice


def _why_it_ended(status: int, limits: Limits) -> dict[str, Any]:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return {"stopped": f"above {limits.seconds} s"}
    return {"error": f"ended with status {os.waitstatus_to_exitcode(status)}"}
