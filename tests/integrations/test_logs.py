"""Refreshes and sharpness in the loggers of the frameworks, against the reports themselves."""

import csv

import pytest
from torch import nn

import llqr
from integrations.small import base_of, data, forget_accelerator, forward, loader, net, parts
from llqr import sharpness
from llqr.integrations import log_refreshes, numbers_of, tensorboard


def prepared():
    model = net()
    optimizer = llqr.Optimizer(base_of(model), model, **parts())
    reports = []
    optimizer.register_refresh_hook(lambda _, report: reports.append(report))
    return model, optimizer, reports


def train(model, optimizer):
    for x, y in loader():
        optimizer.minimize(forward(model, x, y))


def expected(reports):
    assert len(reports) == 2
    return [(r.step, numbers_of(r)) for r in reports]


def test_each_refresh_is_logged_once_with_its_numbers_and_its_step():
    model, optimizer, reports = prepared()
    logged = []
    handle = log_refreshes(optimizer, lambda numbers, step: logged.append((step, numbers)))
    train(model, optimizer)
    assert logged == expected(reports) and [step for step, _ in logged] == [0, 2]
    first, numbers = reports[0], logged[0][1]
    assert numbers["llqr/J_after"] == first.J_after < numbers["llqr/J_before"] == first.J_before
    assert numbers["llqr/change"] == first.change and numbers["llqr/accepted"] == 1.0
    assert not {"llqr/step", "llqr/reason"} & set(numbers)
    assert all(type(number) is float for number in numbers.values())
    handle.remove()
    train(model, optimizer)
    assert len(reports) == 4 and len(logged) == 2


def test_a_refused_refresh_has_the_numbers_that_there_are():
    report = llqr.RefreshReport(step=7, accepted=False, reason="J rises", J_before=1.0, seconds=2.0)
    found = numbers_of(report, "refresh/")
    assert found == {"refresh/accepted": 0.0, "refresh/J_before": 1.0, "refresh/seconds": 2.0}


def test_numbers_of_the_sharpness():
    model, batches = net().eval(), [tuple(data())] * 2

    def loss_of(batch):
        return forward(model, *batch)()

    of = {"batches": batches}
    values = sharpness.eigenvalues(loss_of, model, 2, **of)
    (a, b), (a_error, b_error) = values.values.tolist(), values.standard_errors.tolist()
    assert numbers_of(values, "") == {
        "eigenvalue_1": a,
        "eigenvalue_1_error": a_error,
        "eigenvalue_2": b,
        "eigenvalue_2_error": b_error,
    }
    trace = sharpness.trace(loss_of, model, **of)
    assert numbers_of(trace) == {
        "llqr/trace": trace.value,
        "llqr/trace_error": trace.standard_error,
    }
    for name, found in {
        "worst_case": sharpness.worst_case(loss_of, model, 0.1, steps=2, starts=1, **of),
        "m_sharpness": sharpness.m_sharpness(loss_of, model, 0.1, **of),
    }.items():
        both = {name: found.rise, f"{name}_error": found.standard_error}
        assert numbers_of(found, "") == both and found.rise > 0
    alone = sharpness.eigenvalues(forward(model, *data()), model)
    assert list(numbers_of(alone)) == ["llqr/eigenvalue_1"]  # one batch has no standard error
    with pytest.raises(TypeError, match="result: expected a RefreshReport, or .* got float"):
        numbers_of(1.0)
    with pytest.raises(TypeError, match="optimizer: expected a llqr.Optimizer, got SGD"):
        log_refreshes(base_of(model), print)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer, reports = prepared()
    with SummaryWriter(str(tmp_path)) as writer:
        log_refreshes(optimizer, tensorboard(writer))
        train(model, optimizer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(numbers_of(reports[0]))
    curve = [(e.step, e.value) for e in events.Scalars("llqr/change")]
    assert curve == [(r.step, pytest.approx(r.change)) for r in reports]


def test_accelerate_logs_with_its_trackers():
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self):
            super().__init__()
            self.logged = []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step):
            self.logged.append((step, values))

    forget_accelerator()
    model, optimizer, reports = prepared()
    tracker = Tracker()
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    model, wrapped = accelerator.prepare(model, optimizer)
    log_refreshes(wrapped, accelerator.log)
    train(model, optimizer)
    assert tracker.logged == expected(reports)
    forget_accelerator()


def rows_of(file):
    """The rows of a CSV logger that hold a refresh."""
    rows = list(csv.DictReader(file.read_text().splitlines()))
    found = [
        (int(row["step"]), {n: float(v) for n, v in row.items() if n.startswith("llqr/") and v})
        for row in rows
    ]
    return [(step, numbers) for step, numbers in found if numbers]


def test_fabric_logs_with_its_loggers(tmp_path):
    fabric = pytest.importorskip("lightning.fabric", reason="Lightning is not installed")
    from lightning.fabric.loggers import CSVLogger

    model, optimizer, reports = prepared()
    logger = CSVLogger(tmp_path)
    runner = fabric.Fabric(accelerator="cpu", devices=1, loggers=logger)
    module, wrapped = runner.setup(model, optimizer)
    log_refreshes(wrapped, runner.log_dict)
    train(module, optimizer)
    logger.finalize("success")
    assert rows_of(next(tmp_path.rglob("metrics.csv"))) == expected(reports)


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_lightning_logs_with_the_loggers_of_its_trainer(tmp_path, automatic):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    import llqr.integrations.lightning as integration

    class Automatic(integration.TwoPasses, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def on_train_start(self):
            integration.log_refreshes(self)

        def training_step(self, batch, batch_idx):
            return self.refresh_step(batch, batch_idx)[0]

        def refresh_step(self, batch, batch_idx):
            return forward(self.net, *batch)()

        def configure_optimizers(self):
            self.ours = integration.Optimizer(base_of(self.net), self, **parts())
            self.reports = []
            self.ours.register_refresh_hook(lambda _, report: self.reports.append(report))
            return self.ours

    class Manual(Automatic):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer, closure = self.optimizers(), forward(self.net, *batch)
            optimizer.refresh_if_due(closure)
            for _ in optimizer.passes():
                self.manual_backward(closure()[0])
            optimizer.step()

    module = Automatic() if automatic else Manual()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader())
    assert rows_of(next(tmp_path.rglob("metrics.csv"))) == expected(module.reports)


def test_the_hugging_face_trainer_logs_to_what_it_reports_to(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from llqr.integrations import transformers as integration

    class Trainer(integration.TwoPasses, transformers.Trainer):
        pass

    class Reported(transformers.TrainerCallback):
        logged = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logged.append((state.global_step, dict(logs)))

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            z = self.net(x)
            return {"loss": nn.functional.cross_entropy(z, labels), "logits": z}

    forget_accelerator()
    model = Classifier()
    optimizer = llqr.Optimizer(base_of(model), model, **parts())
    reports, callback = [], Reported()
    optimizer.register_refresh_hook(lambda _, report: reports.append(report))
    trainer = Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=6,
            num_train_epochs=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            save_strategy="no",
        ),
        train_dataset=[{"x": x, "labels": y} for x, y in zip(*data(), strict=True)],
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    integration.log_refreshes(trainer)
    trainer.train()
    found = [
        (step, {n: v for n, v in logs.items() if n.startswith("llqr/")})
        for step, logs in callback.logged
    ]
    assert [(step, numbers) for step, numbers in found if numbers] == expected(reports)
    history = [row for row in trainer.state.log_history if "llqr/change" in row]
    assert [row["llqr/change"] for row in history] == [r.change for r in reports]
    forget_accelerator()
