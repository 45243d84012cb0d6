"""One small training job, and the loop by hand that every framework is compared with."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llqr

ROWS, BATCH, RHO, CLIP = 24, 6, 0.2, 0.5


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 16), nn.Dropout(dropout), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)
    )


def data():
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 5, generator=noise)
    return x, torch.randint(3, (ROWS,), generator=noise)


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=BATCH)


def base_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def parts(structure="kfac"):
    """The geometry and the perturbation of a test."""
    geometry = structure and llqr.LLQR(structure, every=2, steps=4, lr=0.03, ema=0.5)
    return {"geometry": geometry or None, "perturbation": llqr.SAM(RHO)}


def by_hand(
    model,
    accumulate=1,
    clip=None,
    low=None,
    scaler=None,
    epochs=2,
    structure="kfac",
    in_groups=False,
):
    """The same job with minimize(), which test_accumulation.py holds against the joined batch."""
    optimizer = llqr.Optimizer(base_of(model), model, **parts(structure))
    # Sums round differently in another order: some frameworks clip in that of the groups.
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    held = grouped if in_groups else list(model.parameters())
    torch.manual_seed(2)
    for _ in range(epochs):
        batches = list(loader())
        for i in range(0, len(batches), accumulate):
            forwards = [forward(model, *batch, low) for batch in batches[i : i + accumulate]]
            optimizer.minimize(
                forwards,
                scaler=scaler,
                before_step=clip and (lambda: nn.utils.clip_grad_norm_(held, clip)),
            )
    return optimizer


def forward(model, x, y, low=None):
    def run():
        with torch.autocast("cpu", low) if low is not None else nullcontext():
            z = model(x)
            return nn.functional.cross_entropy(z, y), z

    return run


def backward(model, x, y):
    """Run one clean or perturbed backward by hand; return the loss."""
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return float(loss.detach())


def forget_accelerator():
    """Accelerate keeps its settings for the life of a process, also those of other tests."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
