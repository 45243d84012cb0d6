"""LLQR+SAM in a Hugging Face Accelerate loop: accumulation, clipping, bfloat16."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llqr
from llqr.integrations.accelerate import TwoPasses

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = llqr.Optimizer(
        base,
        model,
        geometry=llqr.LLQR("kfac", every=20, lr=0.1, ema=0.5),
        perturbation=llqr.SAM(rho=0.1),
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    two_passes = TwoPasses(accelerator, optimizer)

    losses = []
    for _ in range(10):
        for inputs, targets in loader:

            def forward(inputs=inputs, targets=targets):
                logits = model(inputs)
                return nn.functional.cross_entropy(logits, targets), logits

            with accelerator.accumulate(model):
                losses.append(float(two_passes.backward(forward)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
    print(optimizer.optimizer.last_report)
    print(f"loss {sum(losses[:16]) / 16:.4f} -> {sum(losses[-16:]) / 16:.4f}")
