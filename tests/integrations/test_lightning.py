"""Lightning's Trainer against the loop by hand."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import llqr
import llqr.integrations.lightning as integration
from byhand import sam_step
from integrations.small import (
    BATCH,
    CLIP,
    RHO,
    backward,
    base_of,
    by_hand,
    forward,
    loader,
    net,
    parts,
)
from tiny import everything, same, weights

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    # What Lightning itself warns of in so small a run.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:the forward's autocast is switched off"),
]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


class Automatic(integration.TwoPasses, lightning.LightningModule):
    def __init__(self, dropout=0.0, structure="kfac"):
        super().__init__()
        self.net, self.structure = net(dropout), structure
        self.calls, self.logged = 0, []

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss.detach())
        return loss

    def refresh_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        return nn.functional.cross_entropy(z, y), z

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logged.append(float(outputs["loss"]))

    def configure_optimizers(self):
        return integration.Optimizer(base_of(self.net), self, **parts(self.structure))


class Manual(lightning.LightningModule):
    """Accumulation by hand: the passes run over the batches of a step."""

    def __init__(self, accumulate):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.accumulate, self.held = net(), accumulate, []

    def training_step(self, batch, batch_idx):
        self.held.append(batch)
        if len(self.held) < self.accumulate:
            return
        optimizer, batches = self.optimizers(), self.held
        self.held = []
        optimizer.refresh_if_due([lambda b=b: self.forward_of(b) for b in batches])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        for _ in optimizer.passes(scaler):
            for b in batches:
                self.manual_backward(self.forward_of(b)[0] / len(batches))
        optimizer.step()

    def forward_of(self, batch):
        x, y = batch
        z = self.net(x)
        return nn.functional.cross_entropy(z, y), z

    def configure_optimizers(self):
        return integration.Optimizer(base_of(self.net), self, **parts())


def trained(module, tmp_path, precision=None, epochs=2, **options):
    plugins = []
    if precision == "fp16":  # Lightning's precision="16-mixed" is for CUDA; its plugin is not
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins.append(MixedPrecision("16-mixed", "cpu", scaler))
    elif precision == "bf16":
        plugins.append(MixedPrecision("bf16-mixed", "cpu"))
    torch.manual_seed(2)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        plugins=plugins,
        **options,
    )
    trainer.fit(module, loader())
    return trainer


def manual_by_hand(model, accumulate, low, scaler, epochs=2):
    """Lightning runs all of a manual training step in autocast, the backward included."""
    optimizer = llqr.Optimizer(base_of(model), model, **parts())
    for _ in range(epochs):
        batches = list(loader())
        for i in range(0, len(batches), accumulate):
            forwards = [forward(model, *batch) for batch in batches[i : i + accumulate]]
            with torch.autocast("cpu", low, enabled=low is not None, cache_enabled=False):
                optimizer.refresh_if_due(forwards)
                for _ in optimizer.passes(scaler):
                    for run in forwards:
                        loss = run()[0] / len(forwards)
                        (loss if scaler is None else scaler.scale(loss)).backward()
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
    return optimizer


def hand_scaler(precision):
    return torch.amp.GradScaler("cpu", init_scale=2.0**10) if precision == "fp16" else None


def equal(ours, theirs):
    same(weights(ours), weights(theirs))
    assert not torch.equal(theirs[0].weight, net()[0].weight)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_automatic_optimization(accumulate, clip, precision, tmp_path):
    module, hand = Automatic(), net()
    trainer = trained(
        module, tmp_path, precision, accumulate_grad_batches=accumulate, gradient_clip_val=clip
    )
    optimizer = by_hand(hand, accumulate, clip, LOW[precision], hand_scaler(precision))
    equal(module.net, hand)
    assert trainer.global_step == 8 // accumulate
    ours = trainer.optimizers[0]
    assert ours.state_dict()["param_groups"][0]["llqr.step"] == 8 // accumulate
    assert ours.last_report.J_after == optimizer.last_report.J_after
    assert module.calls == 16


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_manual_optimization(accumulate, precision, tmp_path):
    module, hand = Manual(accumulate), net()
    trainer = trained(module, tmp_path, precision)
    optimizer = manual_by_hand(hand, accumulate, LOW[precision], hand_scaler(precision))
    equal(module.net, hand)
    assert trainer.global_step == 8 // accumulate
    assert trainer.optimizers[0].last_report.J_after == optimizer.last_report.J_after


def test_automatic_optimization_against_plain_torch(tmp_path):
    """SAM written out, without any of this library in it."""
    module, hand = Automatic(structure=None), net()
    trained(module, tmp_path, epochs=1)
    base = base_of(hand)
    for x, y in loader():
        sam_step(base, partial(backward, hand, x, y), RHO)
    equal(module.net, hand)


def test_dropout_masks_are_replayed_micro_batch_by_micro_batch(tmp_path):
    module, hand = Automatic(dropout=0.5), net(0.5)
    trained(module, tmp_path, accumulate_grad_batches=2)
    by_hand(hand, 2)
    equal(module.net, hand)


def test_the_second_pass_logs_nothing(tmp_path):
    """What is logged is the clean loss, once a micro-batch."""
    module, hand = Automatic(structure=None), net()
    trainer = trained(module, tmp_path, epochs=1)
    base, losses = base_of(hand), []

    for x, y in loader():
        losses.append(sam_step(base, partial(backward, hand, x, y), RHO))
    assert module.logged == pytest.approx(losses, rel=1e-6)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(losses[-1], rel=1e-6)
    assert "log" not in vars(module)


@pytest.mark.parametrize("when", [1, 2])
def test_an_infinity_in_either_pass_halves_the_scale(when, tmp_path):
    class Faulty(Automatic):
        def backward(self, loss):
            loss.backward()
            if self.calls == 2 + when:  # in the second step
                self.net[0].weight.grad[0, 0] = float("inf")

    module, hand = Faulty(), net()
    trainer = trained(module, tmp_path, "fp16", epochs=1)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**9
    assert trainer.optimizers[0].state_dict()["param_groups"][0]["llqr.step"] == 3
    # By hand: the second batch is left out, and the scale halves there.
    optimizer = llqr.Optimizer(base_of(hand), hand, **parts())
    scaler = hand_scaler("fp16")
    for i, (x, y) in enumerate(loader()):
        if i == 1:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**9, "_growth_tracker": 0})
            continue

        def forward(x=x, y=y):
            with torch.autocast("cpu", torch.float16):
                z = hand(x)
                return nn.functional.cross_entropy(z, y), z

        optimizer.minimize(forward, scaler=scaler)
    equal(module.net, hand)


def test_a_checkpoint_of_the_trainer_resumes(tmp_path):
    """Two epochs in one go, and one epoch, a checkpoint, another Trainer, the second epoch."""
    whole = Automatic()
    one = trained(whole, tmp_path)
    first = Automatic()
    trainer = trained(first, tmp_path, epochs=1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    second = Automatic()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(second, loader(), ckpt_path=path)
    same(weights(second), weights(whole))
    ours, theirs = (everything(t.optimizers[0])["optimizer"] for t in (trainer, one))
    same(copy.deepcopy(ours), theirs)


def test_a_plain_optimizer_is_refused_and_told(tmp_path):
    class Plain(Automatic):
        def configure_optimizers(self):
            return llqr.Optimizer(base_of(self.net), self, **parts())

    with pytest.raises(TypeError, match="llqr.integrations.lightning.Optimizer"):
        trained(Plain(), tmp_path)


def test_batches_are_let_go(tmp_path):
    module = Automatic()
    trained(module, tmp_path, accumulate_grad_batches=2)
    assert module._micro_batches._seen == []
    assert BATCH * 4 == len(loader().dataset)


def test_a_mixin_that_stands_behind_the_module_is_refused():
    with pytest.raises(TypeError, match=r"write class Late\(TwoPasses, \.\.\.\)"):

        class Late(lightning.LightningModule, integration.TwoPasses):
            pass
