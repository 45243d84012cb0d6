"""Check and measure llqr on an accelerator: one command, torch alone, a few minutes.

    python benchmarks/accelerator.py --device cuda --out DIR

Parts: parity (the numerical core against float64 on the CPU), amp (mixed precision, compiled and
recurrent nets, checkpoints), speed (steps and refreshes over the base's step), launches (kernels
and device reads per step), extras (what this version of the library may not have). Each part runs
in a process of its own with a time limit, so that one that crashes or hangs costs no other. Every
result is appended to DIR/accelerator.jsonl at once; DIR/accelerator.json and .txt (the table) are
written after each part. The exit status is 1 if a check failed or did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Seconds of each part; its process is ended a little later. Together below 8 minutes.
BUDGETS = {"parity": 100, "amp": 90, "speed": 170, "launches": 40, "extras": 50}
GRACE = 15


def main() -> int:
    """Run the parts, print one JSON and one table, and return the exit status."""
    options = parse()
    if options.child:
        from accelerator_parts import run_part

        run_part(options, BUDGETS[options.child[0]])
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "accelerator.jsonl"
        log.unlink(missing_ok=True)
        for part in options.only:
            ended = run_child(part, log, options)
            rows = read(log)
            if ended is not None:
                failure = {"part": part, "name": "the part itself", "status": "failed"}
                rows.append({**failure, "error": ended})
                log.write_text("".join(json.dumps(row) + "\n" for row in rows))
            result = summary(rows)
            (folder / "accelerator.json").write_text(json.dumps(result, indent=1))
            (folder / "accelerator.txt").write_text(table(result["rows"]) + "\n")
    print(json.dumps(result))
    print(table(result["rows"]))
    print(result["counts"])
    return int(result["counts"].get("failed", 0) > 0)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=list(BUDGETS),
        help=f"comma-separated parts, of {', '.join(BUDGETS)}",
    )
    parser.add_argument("--match", default="", help="only checks whose name contains this")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for part in options.only:
        if part not in BUDGETS:
            parser.error(f"--only: expected parts of {', '.join(BUDGETS)}, got {part!r}")
    return options


def run_child(part: str, log: Path, options: argparse.Namespace) -> str | None:
    """Run a part in its own process; return what went wrong with the process, if anything."""
    command = [sys.executable, __file__, "--device", options.device, "--match", options.match]
    command += ["--reduced"] * options.reduced + ["--child", part, str(log.absolute())]
    # cuBLAS reads this once, at its start; deterministic algorithms need it.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}
    try:
        done = subprocess.run(command, env=environment, timeout=BUDGETS[part] + GRACE)
    except subprocess.TimeoutExpired:
        return f"its process was ended after {BUDGETS[part] + GRACE} s, within a check"
    return f"its process ended with status {done.returncode}" if done.returncode else None


def read(log: Path) -> list[dict[str, Any]]:
    """Return the rows that were written; a last line that was cut off is left out."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows with the machine and how many there are of each status."""
    machine = next((row["machine"] for row in rows if "machine" in row), {})
    rows = [row for row in rows if "machine" not in row]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return {"machine": machine, "counts": counts, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Return measurements; what passed or was skipped, by group; and each failure."""
    lines: list[tuple[str, ...]] = []
    passed, skipped = dict[tuple[str, str], list[Any]](), dict[tuple[str, str], list[Any]]()
    for row in rows:
        part, name, status = row["part"], row["name"], row["status"]
        if status == "measured":
            lines.append((part, name, f"{row['value']:.3g}", row.get("note", "")))
        elif status == "ok":
            passed.setdefault((part, name.partition(":")[0]), []).append(row)
        elif status == "skipped":
            skipped.setdefault((part, row["error"]), []).append(row)
    for (part, group), found in passed.items():
        worst = max(found, key=lambda row: row["value"] / (row["bound"] or 1))
        error = f"worst {worst['value']:.2g}, bound {worst['bound']:.2g}"
        lines.append((part, group, f"{len(found)} ok", error))
    for (part, error), found in skipped.items():
        lines.append((part, found[0]["name"].partition(":")[0], f"{len(found)} skipped", error))
    for row in rows:
        if row["status"] == "failed":
            # A value that is not a number was written as text.
            value = f"{row['value']} is not within {row['bound']}" if "value" in row else ""
            lines.append((row["part"], row["name"], "failed", row.get("error", value)))
    return "\n".join(" | ".join(line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
