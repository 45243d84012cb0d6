import torch
from torch import nn

import llqr

torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x[:, :3].square().sum(1) > 2.4).long()
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
geometry = llqr.LLQR("kfac", curvature="fisher", every=40, lr=0.1, ema=0.5)
optimizer = llqr.Optimizer(base, model, geometry=geometry, perturbation=llqr.SAM(rho=0.1))
optimizer.register_refresh_hook(lambda optimizer, report: print(report))


def train_step(x, y):
    def forward():
        logits = model(x)
        return nn.functional.cross_entropy(logits, y), logits

    return optimizer.minimize(forward)


for epoch in range(10):
    losses = [train_step(x[i], y[i]) for i in torch.randperm(512).split(64)]
    print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}")
