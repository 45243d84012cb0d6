"""Sharded parameters: torchrun --nproc-per-node 2 examples/fsdp.py (CPU, gloo)."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

import llqr


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)  # before the optimizer, as torch wants it
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    geometry = llqr.LLQR("kfac", every=40, lr=0.1, ema=0.5)
    optimizer = llqr.Optimizer(base, model, geometry=geometry, perturbation=llqr.SAM(rho=0.1))
    print(f"process {dist.get_rank()} keeps {geometry.memory()['preconditioner']} bytes of U")

    for epoch in range(10):
        losses = []
        for batch in torch.randperm(512).split(64):  # the same permutation in every process
            mine = batch.chunk(dist.get_world_size())[dist.get_rank()]

            def forward(rows=mine):
                logits = model(x[rows])
                return nn.functional.cross_entropy(logits, y[rows]), logits

            losses.append(optimizer.minimize(forward))
        mean = torch.stack(losses).mean()  # minimize returns the loss of this process
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {mean / dist.get_world_size():.4f}")

    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    dist.barrier()  # nobody leaves while another still sends
    sys.stdout.flush()
    os._exit(0)  # gloo's own teardown may abort


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(tempfile.gettempdir(), "llqr_fsdp"))
