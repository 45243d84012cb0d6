"""Train a little, checkpoint often, resume where there is a checkpoint; be killed when asked.

    train.py FOLDER [WHERE STEP]

WHERE is "second pass" or "product" (of a refresh): the last process kills itself there, at STEP. At
the end the first process writes weights and optimizer state to FOLDER/final.pt.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import llqr
from tiny import everything

STEPS, EVERY = 12, 3


def main(folder: str, where: str = "", at: str = "-1") -> None:
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    path = Path(folder) / "checkpoint.pt"
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )
    if size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        model = DistributedDataParallel(model)
    optimizer = llqr.Optimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        model,
        geometry=llqr.LLQR("e-kfac", bases="gradient", every=5, lr=0.3, ema=0.5, renew_every=2),
        perturbation=llqr.FriendlySAM(0.1),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for advice in ("U hardly acts", "J.U. = "):  # as in pyproject.toml
                warnings.filterwarnings("ignore", advice, UserWarning)
            optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["step"]
        print("resumed at", first, flush=True)

    def die() -> None:
        if rank == size - 1:
            print("killed", where, at, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(first, STEPS):
        torch.manual_seed(10 * step + rank)
        x, y = torch.randn(6, 5), torch.randint(3, (6,))
        calls = [0]

        def forward(step: int = step, x=x, y=y, calls=calls):  # type: ignore[no-untyped-def]
            calls[0] += model.training
            if where == "second pass" and step == int(at) and calls[0] == 2:
                die()
            z = model(x)
            return nn.functional.cross_entropy(z, y), z

        if where == "product" and step == int(at):
            llqr.QuadraticModel.product = lambda self, d: die()  # type: ignore[method-assign]
        optimizer.minimize(forward)
        scheduler.step()
        if (step + 1) % EVERY == 0 and rank == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
    assert optimizer.geometry.counters()["refreshes"] == 3
    if rank == 0:
        torch.save(everything(optimizer), Path(folder) / "final.pt")
    if size > 1:
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
