"""Run the checks of one file in this process, beside its sisters; write what came of each.

    checks.py FILE OUT

FILE holds functions named ``check_...`` without arguments; each is run in all processes at the
same time. OUT.RANK receives {name: null, why it was skipped, or the traceback} as JSON. After a
failure the processes are out of step, so the checks behind it are not run.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SKIPPED = "skipped: "


def main(name: str, out: str) -> None:
    torch.set_num_threads(1)
    # A process that waits for one that failed gives up.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    warnings.simplefilter("error")
    for advice in ("U hardly acts", "J.U. = "):  # as in pyproject.toml
        warnings.filterwarnings("ignore", advice, UserWarning)
    module = importlib.import_module(name)
    results: dict[str, str | None] = {}
    fine = True
    for check in [f for n, f in vars(module).items() if n.startswith("check_")]:
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            check()
        except pytest.skip.Exception as reason:
            results[check.__name__] = f"{SKIPPED}{reason}"
            continue
        except BaseException:
            results[check.__name__] = traceback.format_exc()
            fine = False
            break
        results[check.__name__] = None
        print(f"{check.__name__} {time.perf_counter() - began:.2f} s", flush=True)
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
    if fine:
        dist.barrier()
    # The teardown of gloo aborts at random; there is nothing left to do.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
