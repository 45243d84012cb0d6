"""What `import llqr` costs, and what it leaves alone."""

import os
import subprocess
import sys

CODE = """
import gc, sys, time, torch
# Somewhere behind torch's import Python looks through all of torch's objects once.
gc.disable()
before = set(sys.modules)
start = time.process_time()
import llqr
print(time.process_time() - start)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
EACH = """
import sys, torch
for name in ("lightning", "fabric", "accelerate", "transformers"):
    sys.modules[name if name != "fabric" else "lightning.fabric"] = None  # importing it is an error
    __import__(f"llqr.integrations.{name}")
"""


def run(code):
    command = [sys.executable, "-W", "error", "-c", code]
    # Compiled files are kept, as they are for users; else each run would compile the sources. And
    # no tracer of coverage, which would take most of the time.
    left_out = ("PYTHONDONTWRITEBYTECODE", "COV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_takes_a_tenth_of_a_second_beyond_torch():
    """Of the processor's time, the best of five: a busy machine makes any single one slow."""
    seconds = []
    for _ in range(5):
        time, loaded = run(CODE)
        assert loaded == "['llqr']"
        seconds.append(float(time))
        if seconds[-1] < 0.1:
            return
    raise AssertionError(f"import llqr took {min(seconds)} s")


def test_the_integrations_import_no_framework():
    run(EACH)
