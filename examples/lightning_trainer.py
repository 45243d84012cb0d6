"""LLQR+SAM in Lightning's Trainer: automatic optimization, accumulation, clipping, bfloat16."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llqr
import llqr.integrations.lightning


class Net(llqr.integrations.lightning.TwoPasses, lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def refresh_step(self, batch, batch_idx):  # what U is learned from: (loss, logits)
        x, y = batch
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, y), logits

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return llqr.integrations.lightning.Optimizer(
            base,
            self,
            geometry=llqr.LLQR("kfac", every=20, lr=0.1, ema=0.5),
            perturbation=llqr.SAM(rho=0.1),
        )

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * self.trainer.accumulate_grad_batches)


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    module = Net()
    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32))
    print(trainer.optimizers[0].last_report)
    print(f"loss {sum(module.losses[:16]) / 16:.4f} -> {sum(module.losses[-16:]) / 16:.4f}")
