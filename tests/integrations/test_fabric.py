"""Lightning Fabric against the loop by hand."""

import pytest
import torch
from torch import nn

import llqr
from integrations.small import BATCH, CLIP, base_of, by_hand, forward, loader, net, parts
from llqr.integrations.fabric import passes
from tiny import everything, same, weights

fabric_module = pytest.importorskip("lightning.fabric", reason="Lightning is not installed")
from lightning.fabric.plugins import MixedPrecision  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the forward's autocast is switched off")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


def scaler_of(precision):
    return torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "fp16" else None


def fabric_of(precision):
    if precision is None:
        return fabric_module.Fabric(accelerator="cpu", devices=1)
    name = "16-mixed" if precision == "fp16" else "bf16-mixed"
    plugin = MixedPrecision(name, "cpu", scaler_of(precision))
    return fabric_module.Fabric(accelerator="cpu", devices=1, plugins=[plugin])


def trained(precision=None, accumulate=1, clip=None, epochs=2):
    fabric, inner = fabric_of(precision), net()
    model, optimizer = fabric.setup(inner, llqr.Optimizer(base_of(inner), inner, **parts()))
    for _ in range(epochs):
        batches = list(loader())
        for i in range(0, len(batches), accumulate):
            step = batches[i : i + accumulate]

            # A refresh is given the module itself: Fabric's wrapper rounds its inputs.
            optimizer.refresh_if_due([forward(inner, *b) for b in step])
            for _ in passes(fabric, optimizer):
                for b in step:
                    fabric.backward(forward(model, *b)()[0] / len(step))
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
    return inner, optimizer


class Rounded(nn.Module):
    """Fabric's precision wraps the model's forward alone and returns float32."""

    def __init__(self, model, low):
        super().__init__()
        self.inner, self.low = model, low

    def forward(self, x):
        if self.low is None:
            return self.inner(x)
        with torch.autocast("cpu", self.low):
            return self.inner(x).float()


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fabric(accumulate, clip, precision):
    ours, optimizer = trained(precision, accumulate, clip)
    hand = Rounded(net(), LOW[precision])
    theirs = by_hand(hand, accumulate, clip, scaler=scaler_of(precision))
    same(weights(ours), weights(hand.inner))
    assert not torch.equal(ours[0].weight, net()[0].weight)
    assert len(loader()) * BATCH == len(loader().dataset)
    # Read through Fabric's wrapper and at the optimizer itself: the same.
    assert optimizer.last_report is optimizer.optimizer.last_report
    assert optimizer.last_report.J_after == theirs.last_report.J_after


def test_a_group_added_through_the_wrapper_is_known_to_the_optimizer():
    fabric, inner = fabric_of(None), net()
    base = torch.optim.SGD(inner[0].parameters(), lr=0.1)
    model, optimizer = fabric.setup(inner, llqr.Optimizer(base, inner, **parts()))
    optimizer.add_param_group({"params": list(inner[4].parameters())})
    x, y = next(iter(loader()))
    start = weights(inner)
    for i in passes(fabric, optimizer):
        if i:
            there = weights(inner)
        fabric.backward(nn.functional.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match="refresh"):
        optimizer.step()
    moved = {n for n in start if not torch.equal(there[n], start[n])}
    assert moved == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_a_checkpoint_of_fabric_resumes(tmp_path):
    fabric, inner = fabric_of(None), net()
    model, optimizer = fabric.setup(inner, llqr.Optimizer(base_of(inner), inner, **parts()))

    def train(model, optimizer):
        for x, y in loader():

            def forward(x=x, y=y):
                z = model(x)
                return nn.functional.cross_entropy(z, y), z

            optimizer.refresh_if_due(forward)
            for _ in passes(fabric, optimizer):
                fabric.backward(forward()[0])
            optimizer.step()

    train(model, optimizer)
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    train(model, optimizer)
    other = net()
    model, resumed = fabric.setup(other, llqr.Optimizer(base_of(other), other, **parts()))
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": resumed})
    train(model, resumed)
    same(weights(other), weights(inner))
    same(
        everything(resumed.optimizer)["optimizer"],
        everything(optimizer.optimizer)["optimizer"],
    )
