"""Soak: thousands of steps with random faults, against the same run without any.

    python benchmarks/soak.py --steps 10000 --faults 1000

Functions raise and gradients turn infinite, in a refresh and in either pass; the process is killed
(SIGKILL) there, between steps and half-way through writing a checkpoint, and a new one resumes from
the last. A step that failed is tried again. At the end every weight, every entry of the optimizer's
state and U must be bit for bit those of the run without faults; the exit status tells.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimizers load it at their first step: once, before the forks
from torch import Tensor, nn

import llqr

EVERY, SAVE_EVERY, GROWTH = 40, 25, 30
KINDS = [
    "raise in a refresh",
    "raise in pass 1",
    "raise in pass 2",
    "infinity in pass 1",
    "infinity in pass 2",
    "kill in a refresh",
    "kill in pass 1",
    "kill in pass 2",
    "kill between steps",
    "kill in a checkpoint",
]


class Raised(Exception):
    """What a user's function may raise."""


class Faults:
    """The faults that are planned, each injected once; a log on disk survives the process."""

    def __init__(self, folder: Path, plan: dict[int, list[str]]) -> None:
        self.plan, self.log = plan, folder / "injected"
        self.log.touch()
        self.done = Counter(self.log.read_text().splitlines())

    def strike(self, step: int, where: str, z: Tensor | None = None) -> None:
        """Inject what is planned at this place and still to come."""
        for kind in self.plan.get(step, []):
            entry = f"{step} {kind}"
            if not kind.endswith(where) or self.done[entry]:
                continue
            self.done[entry] += 1
            with self.log.open("a") as log:
                print(entry, file=log, flush=True)
            if kind.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if kind.startswith("raise"):
                raise Raised
            assert z is not None
            z.register_hook(lambda g: g * float("inf"))
            return


def plan_of(steps: int, faults: int, seed: int) -> dict[int, list[str]]:
    """Draw steps and kinds of faults; a refresh fails where one is due, a checkpoint likewise."""
    draw, plan = random.Random(seed), {}
    for i in range(faults):
        kind, step = KINDS[i % len(KINDS)], draw.randrange(1, steps)
        every = {"refresh": EVERY, "checkpoint": SAVE_EVERY}.get(kind.split()[-1], 1)
        held = plan.setdefault(max(step // every, 1) * every, [])
        if kind not in held:
            held.append(kind)
    return plan


class Dying:
    """A file in whose middle the process is killed, if that is planned."""

    def __init__(self, path: Path, strike: Callable[[], None]) -> None:
        self.file, self.strike, self.writes = path.open("wb"), strike, 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes == 5:
            self.file.flush()
            self.strike()
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class Run:
    """A small network with dropout, Adam, kfac and FriendlySAM, and a GradScaler for two ways."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        torch.manual_seed(0)
        self.folder, self.faults = folder, faults
        self.x, self.y = torch.randn(256, 8), torch.randint(3, (256,))
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)
        )
        self.base = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.optimizer = llqr.Optimizer(
            self.base,
            self.model,
            geometry=llqr.LLQR("kfac", every=EVERY, steps=5, lr=0.03, ema=0.5),
            perturbation=llqr.FriendlySAM(0.1),
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=GROWTH)
        if (folder / "checkpoint").exists():
            saved = torch.load(folder / "checkpoint", weights_only=True)
            for name in ("model", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(saved[name])

    @property
    def step(self) -> int:
        """The number of steps that counted, as the base knows it."""
        state = self.base.state[self.model[0].weight]
        return int(state["step"]) if state else 0

    def train(self, steps: int) -> None:
        while (step := self.step) < steps:
            self.faults.strike(step, "between steps")
            try:
                self.attempt(step)
            except Raised:
                continue  # the same step again
            if self.step % SAVE_EVERY == 0 and self.step > step:
                self.save()

    def attempt(self, step: int) -> None:
        torch.manual_seed(step)  # the batch and the masks belong to the step, not to the attempt
        rows = torch.randint(256, (16,))
        passes = iter(("pass 1", "pass 2"))

        def forward() -> tuple[Tensor, Tensor]:
            z = self.model(self.x[rows])
            where = next(passes) if self.model.training else "a refresh"
            self.faults.strike(step, where, z)
            return nn.functional.cross_entropy(z, self.y[rows]), z

        (self.by_minimize, self.by_passes, self.by_closure)[step % 3](forward)

    def by_minimize(self, forward: Callable[[], Any]) -> None:
        self.optimizer.minimize(forward, scaler=self.scaler)

    def by_passes(self, forward: Callable[[], Any]) -> None:
        self.optimizer.refresh_if_due(forward)
        for _ in self.optimizer.passes(self.scaler):
            self.scaler.scale(forward()[0]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def by_closure(self, forward: Callable[[], Any]) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = forward()[0]
            loss.backward()
            return loss.detach()

        self.optimizer.refresh_if_due(forward)
        self.optimizer.step(closure)

    def save(self) -> None:
        state = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "scaler")}
        step = self.step
        half = Dying(self.folder / "half", lambda: self.faults.strike(step, "a checkpoint"))
        torch.save(state, half)
        half.file.close()
        os.replace(self.folder / "half", self.folder / "checkpoint")


def work(folder: Path, steps: int, plan: dict[int, list[str]]) -> None:
    """Train to the end in this process, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "a step was skipped")
    run = Run(folder, Faults(folder, plan))
    run.train(steps)
    torch.save(
        {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, folder / "end"
    )


def finish(folder: Path, steps: int, plan: dict[int, list[str]]) -> int:
    """Start processes until one arrives; return how many it took."""
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    for count in range(1, 2 + sum(map(len, plan.values()))):
        process = fork.Process(target=work, args=(folder, steps, plan))
        process.start()
        process.join()
        if process.exitcode == 0:
            return count
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"a process ended with status {process.exitcode}")
    raise SystemExit("more processes were killed than planned")


def entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Walk through a state, leaving out wall times and the count of skipped steps."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("llqr.report.seconds", "llqr.skipped_steps"):
                yield from entries(inner, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from entries(inner, f"{name}/{i}")
    else:
        yield name, value


def differences(one: Path, two: Path) -> tuple[list[str], int]:
    """Return the entries that are not equal bit for bit at the end, and the number of all."""
    a, b = (dict(entries(torch.load(p / "end", weights_only=True))) for p in (one, two))
    names = a.keys() | b.keys()
    missing = object()

    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return [n for n in names if not equal(a.get(n, missing), b.get(n, missing))], len(names)


def main() -> None:
    """Run both, compare, print; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    plan = plan_of(options.steps, options.faults, options.seed)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        quiet, faulty = Path(name, "quiet"), Path(name, "faulty")
        finish(quiet, options.steps, {})
        processes = finish(faulty, options.steps, plan)
        injected = Counter(
            line.partition(" ")[2] for line in (faulty / "injected").read_text().splitlines()
        )
        differing, compared = differences(quiet, faulty)
    planned = Counter(kind for kinds in plan.values() for kind in kinds)
    print("| fault | planned | injected | survived |\n|---|---|---|---|")
    for kind in KINDS:
        # The run arrived, so it went on after every fault.
        print(f"| {kind} | {planned[kind]} | {injected[kind]} | {injected[kind]} |")
    total = injected.total()
    print(f"| all | {planned.total()} | {total} | {total} |")
    print(
        f"\n{options.steps} steps, seed {options.seed}, {processes} processes, {compared} entries"
    )
    print(f"torch {torch.__version__}, {time.perf_counter() - begin:.0f} s with one thread")
    print(f"differences: {len(differing)}")
    for name in sorted(differing)[:20]:
        print(f"  {name}")
    if differing or injected != planned:
        sys.exit(1)


if __name__ == "__main__":
    main()
