"""Hugging Face Trainer against the loop by hand, on a small model made from a configuration."""

import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import llqr
from byhand import sam_step
from integrations.small import CLIP, RHO, base_of, forget_accelerator, parts
from llqr.integrations.transformers import TwoPasses
from tiny import same, weights

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate is not installed")

ROWS, BATCH, LENGTH, WORDS = 16, 4, 6, 11


class Trainer(TwoPasses, transformers.Trainer):
    """Seeded where the loop by hand is: at the first micro-batch."""

    seeded = False

    def training_step(self, *args, **kwargs):
        if not self.seeded:
            torch.manual_seed(2)
            self.seeded = True
        return super().training_step(*args, **kwargs)


@pytest.fixture(autouse=True)
def fresh_state():
    forget_accelerator()
    yield
    forget_accelerator()


def causal(dropout=0.0):
    """A two-layer GPT-2 with 16 channels, random weights: nothing is downloaded."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def sentences():
    """Rows of unequal length: the padding's labels are -100, so micro-batches weigh unequally."""
    noise = torch.Generator().manual_seed(1)
    rows = []
    for i in range(ROWS):
        ids = torch.randint(1, WORDS, (LENGTH,), generator=noise)
        labels = ids.clone()
        labels[LENGTH - i % 4 :] = -100
        if i % 4 == 0:
            labels = ids.clone()
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def trained(tmp_path, model, accumulate=1, clip=0.0, epochs=2, structure="diagonal", **options):
    optimizer = llqr.Optimizer(base_of(model), model, **parts(structure))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
        max_grad_norm=clip,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=sentences(), optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer, optimizer


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, None),
        ({"learning_rate": 0.1, "weight_decay": 0.01}, None),  # as the base has them
        ({"learning_rate": 3e-4}, "TrainingArguments: learning_rate=0.0003, but .* has 0.1; the"),
        (
            {"learning_rate": 3e-4, "weight_decay": 0.2},
            "learning_rate=0.0003, .* and weight_decay=0.2, but the base optimizer has 0.01; ",
        ),
    ],
)
def test_arguments_that_do_not_reach_a_finished_optimizer(tmp_path, recwarn, options, said):
    model = causal()
    optimizer = llqr.Optimizer(base_of(model), model)
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **options)
    Trainer(model=model, args=arguments, optimizers=(optimizer, None))
    found = [str(w.message) for w in recwarn if "TrainingArguments" in str(w.message)]
    assert len(found) == (said is not None) and all(re.search(said, text) for text in found)


def batches():
    rows = sentences()
    for i in range(0, ROWS, BATCH):
        part = rows[i : i + BATCH]
        yield {k: torch.stack([row[k] for row in part]) for k in part[0]}


def forward(model, batch, items, low=False):
    """Sum of the token losses over the number of tokens of the whole step."""

    def run():
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            logits = model(input_ids=batch["input_ids"]).logits
        labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        flat = logits.float().view(-1, WORDS)
        loss = nn.functional.cross_entropy(flat, labels.reshape(-1), reduction="sum") / items
        return loss, logits

    return run


def steps(accumulate):
    """The batches of each step, and the number of tokens in it as the Trainer counts them."""
    held = list(batches())
    for i in range(0, len(held), accumulate):
        step = held[i : i + accumulate]
        yield step, sum(int((b["labels"] != -100).sum()) for b in step)


def by_hand(model, accumulate=1, clip=0.0, epochs=2, structure="diagonal", low=False):
    optimizer = llqr.Optimizer(base_of(model), model, **parts(structure))
    torch.manual_seed(2)
    model.train()
    for _ in range(epochs):
        for step, items in steps(accumulate):
            # minimize takes the mean of the losses, the Trainer their sum.
            runs = [forward(model, b, items / len(step), low) for b in step]
            optimizer.minimize(
                runs,
                before_step=lambda: clip and nn.utils.clip_grad_norm_(model.parameters(), clip),
            )
    return optimizer


@pytest.mark.parametrize("clip", [0.0, CLIP])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer(accumulate, clip, tmp_path):
    ours, hand = causal(), causal()
    trainer, optimizer = trained(tmp_path, ours, accumulate, clip)
    theirs = by_hand(hand, accumulate, clip)
    close(ours, hand)
    assert trainer.state.global_step == 8 // accumulate
    assert optimizer.state_dict()["param_groups"][0]["llqr.step"] == 8 // accumulate
    assert optimizer.last_report.J_after == pytest.approx(theirs.last_report.J_after, rel=1e-4)


def close(ours, theirs, tolerance=2e-6):
    """The Trainer divides sums of float32 losses in another order than the loop by hand."""
    moved = 0.0
    start = weights(causal())
    for (name, a), b in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=name)
        moved = max(moved, float((b - start[name]).abs().max()))
    assert moved > 1e3 * tolerance


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_against_plain_torch(accumulate, tmp_path):
    """SAM written out, without any of this library in it."""
    ours, hand = causal(), causal()
    trained(tmp_path, ours, accumulate, CLIP, epochs=1, structure=None)
    base = base_of(hand)
    hand.train()
    for step, items in steps(accumulate):

        def backward(step=step, items=items):
            for b in step:
                forward(hand, b, items)()[0].backward()

        sam_step(
            base,
            backward,
            RHO,
            before_step=lambda: nn.utils.clip_grad_norm_(hand.parameters(), CLIP),
        )
    close(ours, hand)


@pytest.mark.filterwarnings("ignore:the forward's autocast is switched off")
def test_bfloat16(tmp_path):
    ours, hand = causal(), causal()
    trained(tmp_path, ours, 2, CLIP, bf16=True)
    by_hand(hand, 2, CLIP, low=True)
    close(ours, hand)


def test_dropout_masks_are_replayed_micro_batch_by_micro_batch(tmp_path):
    ours, hand = causal(0.2), causal(0.2)
    trained(tmp_path, ours, 2, epochs=1)
    by_hand(hand, 2, epochs=1)
    close(ours, hand)


def test_a_checkpoint_of_the_trainer_resumes(tmp_path):
    whole = causal()
    trained(tmp_path / "whole", whole, 2)
    half = causal()
    trainer, _ = trained(tmp_path / "half", half, 2, epochs=1)
    trainer._save_checkpoint(half, trial=None)
    checkpoint = next((tmp_path / "half").glob("checkpoint-*"))
    resumed = causal()
    optimizer = llqr.Optimizer(base_of(resumed), resumed, **parts("diagonal"))
    trainer.args.num_train_epochs = 2
    again = Trainer(
        model=resumed,
        args=trainer.args,
        train_dataset=sentences(),
        optimizers=(optimizer, None),
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    same(weights(resumed), weights(whole))


def test_another_optimizer_is_refused(tmp_path):
    model = causal()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=sentences(), optimizers=(base_of(model), None)
    )
    with pytest.raises(TypeError, match="llqr.Optimizer, got SGD"):
        trainer.train()


def test_a_mixin_that_stands_behind_the_trainer_is_refused():
    with pytest.raises(TypeError, match=r"write class Late\(TwoPasses, \.\.\.\)"):

        class Late(transformers.Trainer, TwoPasses):
            pass
