"""Data parallel: torchrun --nproc-per-node 2 examples/ddp.py (CPU, gloo)."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import llqr


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    ddp = DistributedDataParallel(model)
    base = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    geometry = llqr.LLQR("kfac", every=40, lr=0.1, ema=0.5)
    optimizer = llqr.Optimizer(base, ddp, geometry=geometry, perturbation=llqr.SAM(rho=0.1))
    if dist.get_rank() == 0:
        optimizer.register_refresh_hook(lambda optimizer, report: print(report))

    for epoch in range(10):
        losses = []
        for batch in torch.randperm(512).split(64):  # the same permutation in every process
            mine = batch.chunk(dist.get_world_size())[dist.get_rank()]

            def forward(rows=mine):
                logits = ddp(x[rows])
                return nn.functional.cross_entropy(logits, y[rows]), logits

            losses.append(optimizer.minimize(forward))
        mean = torch.stack(losses).mean()  # minimize returns the loss of this process
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {mean / dist.get_world_size():.4f}")
            torch.save(optimizer.state_dict(), os.environ.get("CHECKPOINT", os.devnull))

    dist.barrier()  # nobody leaves while another still sends
    sys.stdout.flush()
    os._exit(0)  # gloo's own teardown may abort


if __name__ == "__main__":
    main()
