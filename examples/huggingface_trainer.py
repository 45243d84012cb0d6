"""LLQR+SAM in the Hugging Face Trainer: a small GPT-2 from a configuration, nothing downloaded."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import llqr
from llqr.integrations.transformers import TwoPasses


class LLQRTrainer(TwoPasses, Trainer):
    pass


if __name__ == "__main__":
    torch.manual_seed(0)
    starts = torch.randint(0, 16, (256, 1))
    rows = (starts + 3 * torch.arange(12)) % 16  # each word is the one before it plus 3
    data = [{"input_ids": row, "labels": row} for row in rows]
    config = GPT2Config(
        vocab_size=16,
        n_positions=12,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    base = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    optimizer = llqr.Optimizer(
        base,
        model,
        geometry=llqr.LLQR("diagonal", every=20, lr=0.1, ema=0.5),
        perturbation=llqr.SAM(rho=0.05),
        graft=True,
    )
    arguments = TrainingArguments(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "trainer_output",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_train_epochs=8,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=8,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = LLQRTrainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(optimizer.last_report)
    print(f"loss {float(losses[0]):.4f} -> {float(losses[-1]):.4f}")
