"""Start a script in several processes on this machine, as torchrun does, and never hang."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(script: Path, *arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start the script with the environment that torchrun gives, output to a file a process."""
    port = str(free_port())
    paths = [str(TESTS.parent / "src"), str(TESTS), str(TESTS / "distributed")]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        }
        log = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        process.log = log  # type: ignore[attr-defined]
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> tuple[list[int], str]:
    """Wait for all; return their exit codes and what they printed. Kill what is late."""
    end = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    printed = []
    for rank, process in enumerate(processes):
        log = process.log  # type: ignore[attr-defined]
        log.seek(0)
        printed.append(f"--- process {rank}, exit code {process.returncode}\n{log.read()}")
        log.close()
    return [process.returncode for process in processes], "\n".join(printed)


def run(
    script: Path, *arguments: str, ranks: int = 2, timeout: float = 300
) -> tuple[list[int], str]:
    return finish(start(script, *arguments, ranks=ranks), timeout)
