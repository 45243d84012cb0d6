"""Frameworks' loops as people run them: batches that fail, are skipped or cut off; metrics."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import llqr
from integrations.small import base_of, data, forget_accelerator, loader, net, parts
from tiny import same, weights

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

import llqr.integrations.accelerate  # noqa: E402
import llqr.integrations.lightning  # noqa: E402
import llqr.integrations.transformers  # noqa: E402

pytestmark = [
    # What Lightning itself warns of in so small a run.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step"),
]
cross_entropy = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def fresh_state():
    forget_accelerator()
    yield
    forget_accelerator()


def batches():
    return list(loader())


def step_by_hand(optimizer, model, micro_batches, divisor):
    """One step on some micro-batches, each loss divided as the framework divides it."""
    if optimizer.geometry is not None:
        optimizer.refresh_if_due([lambda b=b: outputs_of(model, b) for b in micro_batches])
    for _ in optimizer.passes():
        for b in micro_batches:
            (outputs_of(model, b)[0] / divisor).backward()
    optimizer.step()


def outputs_of(model, batch):
    z = model(batch[0])
    return cross_entropy(z, batch[1]), z


def trained_by_hand(steps, divisor, structure="kfac"):
    """Train on the micro-batches of each step, given by their numbers in the epoch."""
    model = net()
    optimizer = llqr.Optimizer(base_of(model), model, **parts(structure))
    held = batches()
    for numbers in steps:
        step_by_hand(optimizer, model, [held[i] for i in numbers], divisor)
    return model, optimizer


# -- Accelerate ------------------------------------------------------------------------------------


class Accelerated:
    """A loop that goes on after errors; ``fails`` holds the calls of the forward that raise."""

    def __init__(self, accumulate=1, fails=(), where="forward", structure="kfac"):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = net()
        optimizer = llqr.Optimizer(base_of(model), model, **parts(structure))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.two_passes = llqr.integrations.accelerate.TwoPasses(self.accelerator, self.optimizer)
        self.fails, self.where, self.calls, self.ran = set(fails), where, 0, []

    def forward(self, i, batch):
        call, self.calls = self.calls, self.calls + 1
        self.ran.append(i)
        loss, z = outputs_of(self.model, batch)
        if call in self.fails:
            if self.where == "forward":
                raise MemoryError
            self.model[0].weight.register_hook(raise_memory_error)  # after others have theirs
        return loss, z

    def run(self, i, batch, clear):
        """Run one turn of the loop; tell whether it went well."""
        with self.accelerator.accumulate(self.model):
            try:
                self.two_passes.backward(lambda: self.forward(i, batch))
            except MemoryError:
                self.model[0].weight._backward_hooks = None
                clear(self)
                return False
            self.optimizer.step()
            self.optimizer.zero_grad()
        return True


class Queue(nn.Module):
    """A loss term that reads a queue of keys and then puts this batch's keys in."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.register_buffer("queue", torch.zeros(3, dtype=next(self.inner.parameters()).dtype))

    def forward(self, x):
        z = self.inner(x) + self.queue
        self.queue = 0.5 * self.queue + z.detach().mean(0)
        return z


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_second_pass_starts_from_the_buffers_of_the_first(accumulate):
    """A queue of keys, read and then written: both passes must meet the same keys."""
    ours, by_hand = Queue(), Queue()
    by_hand.load_state_dict(ours.state_dict())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    made = llqr.Optimizer(base_of(ours), ours, perturbation=llqr.SAM(0.2))
    model, optimizer = accelerator.prepare(ours, made)
    two_passes = llqr.integrations.accelerate.TwoPasses(accelerator, optimizer)
    other = llqr.Optimizer(base_of(by_hand), by_hand, perturbation=llqr.SAM(0.2))
    held = batches()[: 2 * (len(batches()) // 2)]
    for batch in held:
        with accelerator.accumulate(model):
            two_passes.backward(lambda b=batch: outputs_of(model, b))
            optimizer.step()
            optimizer.zero_grad()
    for i in range(0, len(held), accumulate):
        step_by_hand(other, by_hand, held[i : i + accumulate], accumulate)
    assert float(by_hand.queue.abs().max()) > 0
    same(ours.state_dict(), by_hand.state_dict())


def raise_memory_error(gradient):
    raise MemoryError


def forget_gradients(loop):
    for p in loop.model.parameters():
        p.grad = None


CLEARS = {
    "optimizer.zero_grad": lambda loop: loop.optimizer.optimizer.zero_grad(),
    "set_to_none=False": lambda loop: loop.optimizer.optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda loop: loop.model.zero_grad(),
    "p.grad = None": forget_gradients,
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("clear", CLEARS)
def test_accelerate_goes_on_after_a_batch_that_failed(clear, where):
    loop = Accelerated(fails={2}, where=where, structure=None)
    went_well = [loop.run(i, b, CLEARS[clear]) for i, b in enumerate(batches())]
    assert went_well == [True, False, True, True]
    assert loop.ran == [0, 0, 1, 2, 2, 3, 3]
    hand, _ = trained_by_hand([[0], [2], [3]], 1, structure=None)
    same(weights(loop.model), weights(hand))


@pytest.mark.parametrize("clear", CLEARS)
def test_accumulated_micro_batches_are_dropped_with_their_gradients(clear):
    """The second of four fails and everything is cleared: two are left for this step."""
    loop = Accelerated(accumulate=4, fails={1}, structure=None)
    for i, b in enumerate(batches()):
        loop.run(i, b, CLEARS[clear])
    assert loop.ran == [0, 1, 2, 3, 2, 3]
    hand, _ = trained_by_hand([[2, 3]], 4, structure=None)
    same(weights(loop.model), weights(hand))


def test_accumulated_micro_batches_stay_as_long_as_their_gradients():
    """The second of four fails in its forward, which leaves the gradients alone."""
    loop = Accelerated(accumulate=4, fails={1})
    for i, b in enumerate(batches()):
        loop.run(i, b, lambda loop: None)
    hand, optimizer = trained_by_hand([[0, 2, 3]], 4)
    same(weights(loop.model), weights(hand))
    assert loop.optimizer.optimizer.last_report.J_after == optimizer.last_report.J_after


def test_gradients_scaled_in_place_between_micro_batches_are_still_there():
    loop = Accelerated(accumulate=2, structure=None)
    first, second, *_ = batches()
    loop.run(0, first, None)
    for p in loop.model.parameters():
        p.grad *= 1.0
    loop.run(1, second, None)
    assert loop.ran == [0, 1, 0, 1]


def test_a_step_of_ones_own_ends_the_accumulation():
    loop = Accelerated(accumulate=2, structure=None)
    inner, held = loop.optimizer.optimizer, batches()
    loop.run(0, held[0], None)
    with pytest.warns(UserWarning, match="without a perturbed pass"):
        inner.step()
    loop.run(1, held[1], None)
    assert loop.ran == [0, 1, 1]


def test_an_error_in_the_second_pass_ends_the_step():
    """Weights and random numbers are those of the clean pass, and the next step is whole."""
    loop = Accelerated(fails={1}, structure=None)
    first, second, *_ = batches()
    start = weights(loop.model)
    assert not loop.run(0, first, CLEARS["model.zero_grad"])
    same(weights(loop.model), start)
    assert loop.run(1, second, None)
    assert loop.ran == [0, 0, 1, 1]
    hand, _ = trained_by_hand([[1]], 1, structure=None)
    same(weights(loop.model), weights(hand))


def test_a_training_that_starts_anew_with_smaller_batches():
    """find_executable_batch_size around a loop whose TwoPasses outlives the failed attempt."""
    loop, tried = Accelerated(accumulate=2, structure=None), []

    @accelerate.utils.find_executable_batch_size(starting_batch_size=20)
    def train(batch_size):
        tried.append(batch_size)
        loop.model.zero_grad()
        for i, b in enumerate(DataLoader(TensorDataset(*data()), batch_size=batch_size)):
            with loop.accelerator.accumulate(loop.model):
                loop.two_passes.backward(lambda i=i, b=b: loop.forward((batch_size, i), b))
                if len(tried) == 1:
                    raise RuntimeError("CUDA out of memory.")
                loop.optimizer.step()
                loop.optimizer.zero_grad()

    train()
    assert tried == [20, 18]
    # accumulate() counts the failed batch, so the first step of the new training has one.
    assert loop.ran == [(20, 0), (18, 0), (18, 0), (18, 1)]


# -- Hugging Face Trainer --------------------------------------------------------------------------


class Trainer(llqr.integrations.transformers.TwoPasses, transformers.Trainer):
    pass


class Answering(nn.Module):
    """A model of one's own; ``form`` makes what it returns of loss and logits."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form, self.seen, self.fails = net(), form, [], ()

    def forward(self, x, labels=None):
        if len(self.seen) in self.fails:
            self.fails = ()
            raise RuntimeError("CUDA out of memory.")
        self.seen.append(len(x))
        z = self.net(x)
        return self.form(None if labels is None else cross_entropy(z, labels), z)


def trainer_of(tmp_path, model, curvature="fisher", batch_size=6, accumulate=1, **options):
    geometry = curvature and llqr.LLQR("kfac", curvature=curvature, every=2, steps=4, lr=0.03)
    optimizer = llqr.Optimizer(base_of(model), model, geometry=geometry, perturbation=llqr.SAM(0.2))
    keywords = {k: options.pop(k) for k in ("compute_loss_func", "callbacks") if k in options}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **options,
    )
    rows = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    return Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None), **keywords
    ), optimizer


def as_dict(loss, z):
    return {"loss": loss, "logits": z}


@dataclass
class Output(transformers.utils.ModelOutput):
    loss: Any = None
    logits: Any = None


FORMS = {
    "a model output": Output,
    "a dict": as_dict,
    "a tuple": lambda loss, z: (loss, z),
    "a list": lambda loss, z: [loss, z],
    "a tuple with more": lambda loss, z: (loss, z, (z + 1.0,)),
    "logits of another name": lambda loss, z: {"loss": loss, "start_logits": z, "hidden": z + 1.0},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_trainer_takes_what_a_model_returns(form, tmp_path):
    """All forms give the same refresh and the same weights, those of the loop by hand."""
    model = Answering(FORMS[form])
    trainer, optimizer = trainer_of(tmp_path, model)
    trainer.train()
    hand = net()
    theirs = llqr.Optimizer(
        base_of(hand),
        hand,
        geometry=llqr.LLQR("kfac", every=2, steps=4, lr=0.03),
        perturbation=llqr.SAM(0.2),
    )
    for b in batches():
        theirs.minimize(lambda b=b: outputs_of(hand, b))
    same(weights(model.net), weights(hand))
    assert optimizer.last_report.J_after == theirs.last_report.J_after


@pytest.mark.parametrize("form", [lambda loss, z: {"loss": loss}, lambda loss, z: (loss,)])
def test_a_loss_alone_is_enough_for_newton_and_refused_for_fisher(form, tmp_path):
    trainer, optimizer = trainer_of(tmp_path, Answering(form), "newton")
    trainer.train()
    assert optimizer.last_report is not None
    with pytest.raises(ValueError, match="forward returned only a loss"):
        trainer_of(tmp_path, Answering(form), "fisher")[0].train()


FORMS_WITHOUT_LOSS = {
    "logits": lambda loss, z: z,
    "a tuple": lambda loss, z: (z,),
    "a dict": lambda loss, z: {"logits": z},
}


@pytest.mark.parametrize("form", FORMS_WITHOUT_LOSS)
def test_a_loss_of_the_trainers_own(form, tmp_path):
    """compute_loss_func: the model returns logits, in any form."""

    def loss_of(outputs, labels, num_items_in_batch=None):
        z = outputs["logits"] if isinstance(outputs, dict) else outputs
        return cross_entropy(z[0] if isinstance(z, tuple) else z, labels)

    reports = []
    for model, options in (
        (Answering(FORMS_WITHOUT_LOSS[form]), {"compute_loss_func": loss_of}),
        (Answering(as_dict), {}),
    ):
        trainer, optimizer = trainer_of(tmp_path, model, **options)
        trainer.train()
        reports.append(optimizer.last_report.J_after)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("fails", [0, 1, 3])
@pytest.mark.parametrize("curvature", [None, "fisher"])
def test_auto_find_batch_size_starts_anew(fails, curvature, tmp_path):
    """It fails in the first micro-batch, in the second, or at theta + eps, with 6 rows each.

    The training with fewer rows is the one that begins with them.
    """
    found, begun = Answering(as_dict), Answering(as_dict)
    found.fails = {fails}
    trainer, _ = trainer_of(tmp_path, found, curvature, 6, accumulate=2, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size == 5 and found.fails == ()
    trainer_of(tmp_path, begun, curvature, 5, accumulate=2)[0].train()
    assert found.seen[fails:] == begun.seen
    same(weights(found), weights(begun))


def test_a_training_cut_off_within_a_step_and_begun_again(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = not again

    model, again = Answering(as_dict), False
    trainer, _ = trainer_of(tmp_path, model, None, accumulate=2, callbacks=[Stop()])
    trainer.train()
    assert model.seen == [6]  # one micro-batch, no step
    same(weights(model.net), weights(net()))
    again = True
    trainer.train()
    hand, _ = trained_by_hand([[0, 1], [2, 3]], 2, structure=None)
    same(weights(model.net), weights(hand))


def test_what_compute_loss_logs_is_logged_once(tmp_path):
    class Logging(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            self.log({"mine": float(loss.detach())})
            return (loss, outputs) if return_outputs else loss

    trainer, _ = trainer_of(tmp_path, Answering(as_dict))
    trainer.__class__ = Logging
    trainer.train()
    assert sum("mine" in entry for entry in trainer.state.log_history) == 4
    assert "log" not in vars(trainer)


# -- Lightning -------------------------------------------------------------------------------------


class Skipping(llqr.integrations.lightning.TwoPasses, lightning.LightningModule):
    """``skip``: numbers of the batches whose training step returns None."""

    def __init__(self, skip=(), structure="kfac"):
        super().__init__()
        self.net, self.skip, self.structure, self.calls = net(), set(skip), structure, 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if batch_idx in self.skip:
            return None
        return cross_entropy(self.net(batch[0]), batch[1])

    def refresh_step(self, batch, batch_idx):
        assert batch_idx not in self.skip
        return outputs_of(self.net, batch)

    def configure_optimizers(self):
        optimizer = llqr.integrations.lightning.Optimizer
        return optimizer(base_of(self.net), self, **parts(self.structure))


def lightning_trainer(tmp_path, epochs=1, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def fit(module, tmp_path, **options):
    trainer = lightning_trainer(tmp_path, **options)
    trainer.fit(module, loader())
    return trainer


@pytest.mark.parametrize("structure", [None, "kfac"])
@pytest.mark.parametrize(
    ("skip", "accumulate", "steps"),
    [
        ([3], 1, [[0], [1], [2]]),
        ([0], 1, [[1], [2], [3]]),
        ([1, 2], 1, [[0], [3]]),
        ([0], 2, [[1], [2, 3]]),
        ([1], 2, [[0], [2, 3]]),
        ([2, 3], 2, [[0, 1]]),
        ([0, 1], 2, [[2, 3]]),
        ([1, 2], 4, [[0, 3]]),
        ([0, 1, 2, 3], 1, []),
    ],
)
def test_batches_that_lightning_skips(skip, accumulate, steps, structure, tmp_path):
    module = Skipping(skip, structure)
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulate)
    hand, optimizer = trained_by_hand(steps, accumulate, structure)
    same(weights(module.net), weights(hand))
    ours, theirs = trainer.optimizers[0].last_report, optimizer.last_report
    assert (ours and ours.J_after) == (theirs and theirs.J_after)
    # A skipped batch is not run a second time.
    assert module.calls == 4 + (4 - len(skip))
    assert "backward" not in vars(module)


def test_a_skipped_batch_with_a_scaler(tmp_path):
    """Lightning leaves the step out if its last micro-batch is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module = Skipping([1], structure=None)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, tmp_path, plugins=[precision], accumulate_grad_batches=2)
    assert scaler.get_scale() == 2.0**10
    assert module.trainer.optimizers[0]._progress.step == 1


@pytest.mark.parametrize("when", ["before super", "after super"])
@pytest.mark.parametrize(("at", "rest"), [(0, []), (1, []), (2, [[0, 1]]), (3, [[0, 1]])])
def test_an_epoch_that_is_cut_off(at, rest, when, tmp_path):
    """on_train_batch_start returns -1; the second epoch clears what was accumulated."""

    class CutOff(Skipping):
        def on_train_batch_start(self, batch, batch_idx):
            cut = self.current_epoch == 0 and batch_idx == at
            if cut and when == "before super":
                return -1
            super().on_train_batch_start(batch, batch_idx)
            return -1 if cut else None

    module = CutOff(structure=None)
    fit(module, tmp_path, epochs=2, accumulate_grad_batches=2)
    hand, _ = trained_by_hand([*rest, [0, 1], [2, 3]], 2, structure=None)
    same(weights(module.net), weights(hand))


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_by_hand_within_an_accumulation(to_none, tmp_path):
    class Clearing(Skipping):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0:
                self.optimizers().optimizer.zero_grad(set_to_none=to_none)

    module = Clearing(structure=None)
    fit(module, tmp_path, accumulate_grad_batches=2)
    hand, _ = trained_by_hand([[1], [2, 3]], 2, structure=None)
    same(weights(module.net), weights(hand))


def test_gradients_that_lightning_clears_with_zeros(tmp_path):
    class Zeros(Skipping):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    module = Zeros([0, 3])
    fit(module, tmp_path, accumulate_grad_batches=2)
    hand, _ = trained_by_hand([[1], [2]], 2)
    same(weights(module.net), weights(hand))


def test_a_fit_that_failed_and_another_one(tmp_path):
    class Failing(Skipping):
        failed = False

        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and not self.failed:
                self.failed = True
                raise MemoryError
            return super().training_step(batch, batch_idx)

    module = Failing(structure=None)
    with pytest.raises(MemoryError):
        fit(module, tmp_path, accumulate_grad_batches=2)
    fit(module, tmp_path, accumulate_grad_batches=2)
    hand, _ = trained_by_hand([[0, 1], [2, 3]], 2, structure=None)
    same(weights(module.net), weights(hand))


def test_hooks_that_do_not_call_super(tmp_path):
    """Only on_train_batch_start and optimizer_step need to."""

    class Overriding(Skipping):
        def on_before_zero_grad(self, optimizer):
            pass

        def on_before_backward(self, loss):
            pass

        def backward(self, loss):
            loss.backward()

        def on_after_backward(self):
            pass

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    module = Overriding([2])
    fit(module, tmp_path, accumulate_grad_batches=2)
    hand, _ = trained_by_hand([[0, 1], [3]], 2)
    same(weights(module.net), weights(hand))


def test_a_copy_made_between_start_and_backward_is_its_own(tmp_path):
    class Copied(Skipping):
        twin = None

        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.twin is None:
                type(self).twin = pickle.loads(pickle.dumps(self)), copy.deepcopy(self)
            return super().training_step(batch, batch_idx)

    Copied.__qualname__ = "Copied"
    globals()["Copied"] = Copied  # where pickle looks
    module = Copied(structure=None)
    fit(module, tmp_path, accumulate_grad_batches=2)
    for twin in Copied.twin:
        before = weights(module.net)
        twin.load_state_dict(Skipping().state_dict())
        fit(twin, tmp_path, accumulate_grad_batches=2)
        same(weights(twin.net), before)
        same(weights(module.net), before)
    del globals()["Copied"]


def test_a_search_for_the_batch_size_leaves_no_trace(tmp_path):
    """Lightning's Tuner runs trials until memory ends, then puts the weights back."""

    class Sized(Skipping):
        batch_size = 3

        def train_dataloader(self):
            return DataLoader(TensorDataset(*data()), batch_size=self.batch_size)

        def training_step(self, batch, batch_idx):
            if len(batch[0]) > 6:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    module = Sized(structure=None)
    trainer = lightning_trainer(tmp_path, accumulate_grad_batches=2)
    found = Tuner(trainer).scale_batch_size(module, mode="power", init_val=3, steps_per_trial=3)
    same(weights(module.net), weights(net()))
    assert found == module.batch_size == 6
    trainer.fit(module)
    hand, _ = trained_by_hand([[0, 1], [2, 3]], 2, structure=None)
    same(weights(module.net), weights(hand))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_an_iterator_as_batch_is_refused(tmp_path):
    class Iterating(Skipping):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(TypeError, match="cannot be run a second time"):
        fit(Iterating(), tmp_path)


# -- metrics in Lightning --------------------------------------------------------------------------


class Counter:
    """A metric of no package, with state in a list, a deque, a dict and a number."""

    def __init__(self):
        self.reset()

    def update(self, z, y):
        self.total = self.total + float((z.argmax(1) == y).sum())
        self.seen.append(len(y))
        self.last.append(float(z.sum()))
        self.by_class.setdefault(int(y[0]), torch.zeros(())).add_(1)
        self.newest = z.detach().clone()

    def compute(self):
        return self.total / sum(self.seen)

    def reset(self):
        self.total, self.seen, self.last, self.by_class = 0.0, [], deque(maxlen=3), {}


class Measuring(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()
        classes = {"task": "multiclass", "num_classes": 3}
        self.mean = torchmetrics.MeanMetric()
        self.minimum = torchmetrics.MinMetric()
        self.group = torchmetrics.MetricCollection(
            [
                torchmetrics.Accuracy(**classes, average="micro"),
                torchmetrics.Precision(**classes, average="macro"),
                torchmetrics.Recall(**classes, average="macro"),
                torchmetrics.ConfusionMatrix(**classes),
            ]
        )
        self.listed = torchmetrics.CatMetric()
        self.running = torchmetrics.wrappers.Running(torchmetrics.MeanMetric(), window=2)
        self.range = torchmetrics.MinMaxMetric(torchmetrics.Accuracy(**classes))
        self.counter = Counter()
        self.epochs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.net(x)
        loss = cross_entropy(z, y)
        value = self.mean(loss.detach())  # a call: updates, and returns that of the batch
        self.minimum.update(loss.detach())
        self.group.update(z.detach(), y)
        self.listed.update(z.detach().flatten())
        self.running.update(loss.detach())
        self.range.update(z.detach(), y)
        self.counter.update(z.detach(), y)
        self.log("loss", value)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        counter = vars(self.counter)
        found = {
            "mean": (float(self.mean.weight), self.mean.compute()),
            "minimum": self.minimum.compute(),
            "group": self.group.compute(),
            "listed": self.listed.compute(),
            "running": self.running.compute(),
            "range": self.range.compute(),
            "counter": copy.deepcopy({k: counter[k] for k in sorted(counter) if k != "last"}),
            "last": list(self.counter.last),
        }
        self.epochs.append(found)
        for metric in (self.minimum, self.group, self.listed, self.range, self.counter):
            metric.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


class MeasuringInTwoPasses(llqr.integrations.lightning.TwoPasses, Measuring):
    """By default, a refresh runs the training step, metrics and all."""

    def configure_optimizers(self):
        geometry = llqr.LLQR("diagonal", curvature="newton", every=1, steps=2)
        return llqr.integrations.lightning.Optimizer(
            super().configure_optimizers(), self, geometry=geometry, perturbation=llqr.SAM(0.5)
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_count_each_batch_once_at_the_clean_weights(accumulate, tmp_path):
    """At learning rate 0 they equal those of a plain optimizer."""
    ours, plain = MeasuringInTwoPasses(), Measuring()
    for module in (ours, plain):
        fit(module, tmp_path, epochs=2, accumulate_grad_batches=accumulate)
    report = ours.trainer.optimizers[0].last_report
    assert report is not None and report.step > 0
    assert ours.epochs[0]["mean"][0] == len(loader())
    assert ours.epochs[0]["counter"]["by_class"].keys() >= {0, 1}
    same(ours.epochs, plain.epochs)


def test_what_a_metric_grows_within_the_second_pass_is_taken_away(tmp_path):
    """New attributes, resized tensors, and objects that are swapped for others."""

    class Growing:
        def __init__(self):
            self.reset()

        def update(self):
            self.calls += 1
            setattr(self, f"call_{self.calls}", self.calls)
            self.kept.resize_(self.calls).fill_(1)
            self.seen = [*self.seen, self.calls]
            self.numbers.add(self.calls)

        def compute(self):
            return self.calls

        def reset(self):
            self.calls, self.seen, self.kept, self.numbers = 0, [], torch.ones(0), set()

    class Module(Skipping):
        def training_step(self, batch, batch_idx):
            self.growing.update()
            return super().training_step(batch, batch_idx)

    module = Module(structure=None)
    module.growing = Growing()
    kept = module.growing.kept
    fit(module, tmp_path)
    expected = Growing()
    for _ in range(4):
        expected.update()
    same(vars(module.growing), vars(expected))
    assert module.growing.kept is kept and module.calls == 8
