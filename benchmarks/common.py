"""What the benchmarks share: problems, clocks, peak memory, and one table with its JSON."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llqr
from llqr_lab.common.environment import processor_name
from llqr_lab.models.resnet import resnet18
from llqr_lab.models.vit import vit

#: What makes glibc keep memory that was freed.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Classifier:
    """A model with one batch; a forward as LLQR wants it: (loss, outputs)."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, device: str) -> None:
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        z = self.model(self.x)
        return F.cross_entropy(z.flatten(0, -2), self.y.flatten()), z

    def part(self, rows: slice) -> Classifier:
        """The same model on some rows of the batch."""
        return Classifier(self.model, self.x[rows], self.y[rows], self.x.device.type)

    def step(self) -> None:
        """The unit of all ratios: one forward and backward."""
        self.model.zero_grad()
        self()[0].backward()


class Sequences(nn.Module):
    """torch's own transformer, reading and writing tokens."""

    def __init__(self, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.transformer = nn.Transformer(
            width, 4, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embedding(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.transformer(e, e, tgt_mask=mask, tgt_is_causal=True))


def problem(name: str, device: str, batch: int | None = None) -> Classifier:
    """Build a problem and take a few steps, so that norms have statistics and U something to do."""
    torch.manual_seed(0)
    if name == "resnet18":
        b = batch or 32
        built = Classifier(resnet18(10), torch.randn(b, 3, 32, 32), torch.randint(10, (b,)), device)
    elif name == "vit":
        b = batch or 16
        model = vit(100, size="Ti", patch=8, image=64)
        built = Classifier(model, torch.randn(b, 3, 64, 64), torch.randint(100, (b,)), device)
    elif name == "mlp":
        b, layers = batch or 128, []
        for _ in range(4):
            layers += [nn.Linear(1024, 1024), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(1024, 10))
        built = Classifier(model, torch.randn(b, 1024), torch.randint(10, (b,)), device)
    elif name == "transformer":
        b = batch or 16
        model = Sequences(1000, 256, 2)
        tokens = torch.randint(1000, (b, 32))
        built = Classifier(model, tokens, tokens.roll(-1, 1), device)
    else:
        raise ValueError(f"model: expected one of {', '.join(PROBLEMS)}, got {name!r}")
    base = torch.optim.SGD(built.model.parameters(), lr=0.01)
    for _ in range(5):
        built.step()
        base.step()
    # Statistics of norms as they are for these weights: further steps leave them so.
    torch.optim.swa_utils.update_bn([built.x], built.model)
    return built


PROBLEMS = ("resnet18", "vit", "mlp", "transformer")


class Clock:
    """Seconds of a call, waiting for the device before and after.

    One CPU thread is timed in seconds of that processor, which others on the machine disturb less.
    """

    def __init__(self, device: str) -> None:
        self._wait = getattr(torch, device).synchronize if device != "cpu" else lambda: None
        alone = device == "cpu" and torch.get_num_threads() == 1
        self._now = time.process_time if alone else time.perf_counter

    def __call__(self, call: Callable[[], Any]) -> float:
        self._wait()
        began = self._now()
        call()
        self._wait()
        return self._now() - began

    def medians(
        self, calls: dict[str, Callable[[], Any]], repeats: int, warm: int = 1
    ) -> dict[str, float]:
        """Time calls in turns (what slows the machine down slows all), after ``warm`` rounds."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(repeats + warm):
            for name, call in calls.items():
                seconds = self(call)
                if i >= warm:
                    times[name].append(seconds)
        return {name: statistics.median(t) for name, t in times.items()}


def optimizer_of(p: Classifier, geometry: llqr.Geometry | None, **options: Any) -> llqr.Optimizer:
    """SGD with momentum under a geometry."""
    base = torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)
    return llqr.Optimizer(base, p.model, geometry=geometry, **options)


def memory_kept() -> bool:
    """Tell whether glibc was told to keep memory."""
    return KEPT.items() <= os.environ.items()


def peak_memory(script: str, *arguments: str) -> float:
    """Return the MiB that a script printed, in a process of its own that keeps no memory."""
    command = [sys.executable, script, *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in KEPT}
    out = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return float(out.splitlines()[-1])


def memory_of(call: Callable[[], Any], device: str, before: float) -> float:
    """Return the peak in MiB, above ``before``, of this process since it began."""
    call()
    if device != "cpu":
        return getattr(torch, device).max_memory_allocated() / 2**20
    return resident("VmHWM") - before


def resident(key: str = "VmRSS") -> float:
    """Return a line of /proc/self/status in MiB."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def arguments(description: str | None, **choices: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    if "--keep-memory" in sys.argv and not memory_kept():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let glibc keep what a refresh gives back, as CUDA's allocator does, so that its "
        "next use costs no page faults; without it a refresh pays them anew",
    )
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="*", choices=values, default=list(values))
    return parser


def show(title: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print one table with where it was measured, and write it as JSON."""
    place = {
        "machine": _processor(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "llqr": llqr.__version__,
        "python": platform.python_version(),
        "memory": "kept" if memory_kept() else "given back",
    }
    print(f"\n{title}\n" + ", ".join(f"{k} {v}" for k, v in place.items()) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for i, line in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    if options.out:
        options.out.write_text(json.dumps({"title": title, **place, "rows": rows}, indent=1))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor(device: str) -> str:
    if device != "cpu":
        return str(getattr(torch, device).get_device_name())
    return processor_name()
