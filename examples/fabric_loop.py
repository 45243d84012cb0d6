"""LLQR+SAM in a Lightning Fabric loop: accumulation, clipping, bfloat16."""

import torch
from lightning.fabric import Fabric
from torch import nn

import llqr
from llqr.integrations.fabric import passes

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    optimizer = llqr.Optimizer(
        base,
        net,
        geometry=llqr.LLQR("kfac", every=20, lr=0.1, ema=0.5),
        perturbation=llqr.SAM(rho=0.1),
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model, optimizer = fabric.setup(net, optimizer)

    def loss_and_logits(module, rows):
        logits = module(x[rows])
        return nn.functional.cross_entropy(logits, y[rows]), logits

    losses = []
    for _ in range(10):
        for rows in torch.randperm(512).split(64):
            micro = rows.split(32)
            # A refresh is given the module itself: Fabric's wrapper would round its inputs.
            optimizer.refresh_if_due([lambda r=r: loss_and_logits(net, r) for r in micro])
            for which in passes(fabric, optimizer):
                for r in micro:
                    loss, _ = loss_and_logits(model, r)
                    fabric.backward(loss / len(micro))
                    if which == 0:
                        losses.append(float(loss.detach()))
            fabric.clip_gradients(model, optimizer, max_norm=5.0)
            optimizer.step()
    print(optimizer.last_report)
    print(f"loss {sum(losses[:16]) / 16:.4f} -> {sum(losses[-16:]) / 16:.4f}")
