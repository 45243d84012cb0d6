"""Several processes: each check of the files named below is a test here, run once in a launch."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from checks import SKIPPED
from launch import run

HERE = Path(__file__).parent
FILES = ("checks_ddp", "checks_norms", "checks_shares", "checks_fsdp", "checks_checkpoint")


def checks(file: str) -> list[str]:
    tree = ast.parse((HERE / f"{file}.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("check_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Launch a file once; {check: what went wrong, a process}."""
    known = {}

    def of(file):
        if file not in known:
            out = tmp_path_factory.mktemp(file) / "out"
            _, printed = run(HERE / "checks.py", file, str(out), timeout=300)
            written = [Path(f"{out}.{rank}") for rank in range(2)]
            parts = [json.loads(p.read_text()) if p.exists() else {} for p in written]
            known[file] = parts, printed
        return known[file]

    return of


@pytest.mark.parametrize(("file", "check"), [(f, c) for f in FILES for c in checks(f)])
def test_two_processes(results, file, check):
    parts, printed = results(file)
    if (reason := str(parts[0].get(check))).startswith(SKIPPED):
        pytest.skip(reason.removeprefix(SKIPPED))
    for rank, part in enumerate(parts):
        if part.get(check, "missing") is not None:
            before = [trace for p in parts for trace in p.values() if trace]
            pytest.fail(
                f"process {rank}: {part.get(check) or 'not run'}\n"
                + "\n".join(before or [printed]),
                pytrace=False,
            )
