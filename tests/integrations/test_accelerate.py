"""Hugging Face Accelerate against the loop by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import llqr
from integrations.small import CLIP, base_of, by_hand, forget_accelerator, loader, net, parts
from llqr.integrations.accelerate import TwoPasses
from tiny import same, weights

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the forward's autocast is switched off"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step"),
]


@pytest.fixture(autouse=True)
def fresh_state():
    forget_accelerator()
    yield
    forget_accelerator()


def prepared(precision=None, accumulate=1, dropout=0.0):
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        mixed_precision="bf16" if precision == "bf16" else "no",
    )
    if precision == "scaler":
        # Accelerate's fp16 asks for a GPU; its code with a scaler is the same, so it is given one.
        accelerator.scaler = scaler_of()
    model = net(dropout)
    optimizer = llqr.Optimizer(base_of(model), model, **parts())
    return accelerator, *accelerator.prepare(model, optimizer, loader())


def scaler_of():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


def trained(precision=None, accumulate=1, clip=None, dropout=0.0, epochs=2):
    accelerator, model, optimizer, batches = prepared(precision, accumulate, dropout)
    two_passes = TwoPasses(accelerator, optimizer)
    torch.manual_seed(2)
    losses = []
    for _ in range(epochs):
        for x, y in batches:

            def forward(x=x, y=y):
                z = model(x)
                return nn.functional.cross_entropy(z, y), z

            with accelerator.accumulate(model):
                losses.append(two_passes.backward(forward))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model), optimizer, losses


class Rounded(nn.Module):
    """Accelerate wraps the model's forward and returns float32."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("precision", ["bf16", None])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate, clip, precision):
    ours, optimizer, losses = trained(precision, accumulate, clip)
    inner = net()
    hand = Rounded(inner) if precision == "bf16" else inner
    theirs = by_hand(hand, accumulate, clip)
    same(weights(ours), weights(inner))
    assert not torch.equal(inner[0].weight, net()[0].weight)
    assert optimizer.optimizer.last_report.J_after == theirs.last_report.J_after
    assert len(losses) == 8 and losses[-1] < losses[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_a_scaler(accumulate):
    ours, optimizer, _ = trained("scaler", accumulate)
    hand = net()
    by_hand(hand, accumulate, scaler=scaler_of())
    same(weights(ours), weights(hand))
    assert not optimizer.step_was_skipped


@pytest.mark.parametrize("when", [0, 1])
def test_an_infinity_in_either_pass_halves_the_scale(when):
    accelerator, model, optimizer, batches = prepared("scaler")
    two_passes, calls = TwoPasses(accelerator, optimizer), []
    start = weights(model)
    x, y = next(iter(batches))

    def forward():
        z = model(x)
        loss = nn.functional.cross_entropy(z, y)
        if len(calls) == when + 1:  # the refresh is call 0 or 1 here: see below
            z.register_hook(lambda g: g * float("inf"))
        calls.append(None)
        return loss, z

    optimizer.optimizer.refresh(forward)
    calls[:] = [None]
    with accelerator.accumulate(model):
        two_passes.backward(forward)
        optimizer.step()
    assert len(calls) == 3
    assert optimizer.step_was_skipped and accelerator.scaler.get_scale() == 2.0**9
    same(weights(model), start)


def test_dropout_masks_are_replayed_micro_batch_by_micro_batch():
    ours, _, _ = trained(accumulate=2, dropout=0.5)
    hand = net(0.5)
    by_hand(hand, 2)
    same(weights(ours), weights(hand))


def test_without_accumulation_the_optimizers_own_passes_do():
    accelerator, model, optimizer, batches = prepared()
    for _ in range(2):
        for x, y in batches:

            def forward(x=x, y=y):
                z = model(x)
                return nn.functional.cross_entropy(z, y), z

            optimizer.optimizer.refresh_if_due(forward)
            for _ in optimizer.optimizer.passes(accelerator.scaler):
                accelerator.backward(forward()[0])
            optimizer.step()
    hand = net()
    by_hand(hand)
    same(weights(model), weights(hand))


def test_a_checkpoint_of_accelerate_resumes(tmp_path):
    def train(accelerator, model, optimizer, batches):
        two_passes = TwoPasses(accelerator, optimizer)
        for x, y in batches:
            with accelerator.accumulate(model):
                two_passes.backward(
                    lambda x=x, y=y: (nn.functional.cross_entropy(z := model(x), y), z)
                )
                optimizer.step()
                optimizer.zero_grad()

    first = prepared()
    train(*first)
    first[0].save_state(tmp_path)
    train(*first)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    second = prepared()
    second[0].load_state(tmp_path)
    train(*second)
    same(weights(second[1]), weights(first[1]))


def test_another_optimizer_is_refused():
    accelerator, model, _, _ = prepared()
    base = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="llqr.Optimizer, got SGD"):
        TwoPasses(accelerator, base)


def test_a_forward_that_reads_the_next_batch_is_refused():
    accelerator, model, optimizer, batches = prepared(accumulate=2)
    two_passes = TwoPasses(accelerator, optimizer)
    with pytest.raises(ValueError, match=r"forward: '[xy]' is no longer what it was.*bind it"):
        for x, y in batches:

            def forward():
                z = model(x)  # noqa: B023
                return nn.functional.cross_entropy(z, y), z  # noqa: B023

            with accelerator.accumulate(model):
                two_passes.backward(forward)


def test_a_loss_in_the_place_of_a_forward_is_refused():
    accelerator, model, optimizer, batches = prepared()
    with pytest.raises(TypeError, match="forward: expected a function that returns the loss"):
        TwoPasses(accelerator, optimizer).backward(model(next(iter(batches))[0]).sum())


#: Has the name of an attribute that the forward below reads.
loss = torch.zeros(())
last = None


def test_a_forward_may_read_attributes_and_keep_what_it_computed():
    """Their names are also those of global variables, which hold other tensors each time."""
    global loss
    accelerator, model, optimizer, batches = prepared(accumulate=2)
    two_passes = TwoPasses(accelerator, optimizer)
    for x, y in batches:

        def forward(x=x, y=y):
            global last
            last = model(x)
            out = SimpleNamespace(loss=nn.functional.cross_entropy(last, y), logits=last)
            return out.loss, out.logits

        with accelerator.accumulate(model):
            loss = two_passes.backward(forward)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.optimizer.skipped_steps == 0
