"""The training loop of every recipe that trains, the demo included; resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

import llqr

from ..common.output import show_refreshes, step_bar, without_nan
from .build import optimizer_of, schedule_of
from .config import flat_settings
from .draws import seed_of
from .records import Records
from .task import Forward, Task
from .workers import Workers

__all__ = ["Training"]


class Training:
    """A run in progress.

    All that is random is a function of the seed and the step, so a checkpoint holds the network,
    the optimizer, the schedule and the place in the data, and a resumed run ends with
    the weights, bit for bit, of one that was never interrupted.

    Args:
        config: of the run.
        task: data and network.
        workers: the processes.
        records: where measurements and checkpoints go.

    Attributes:
        seconds: of steps and refreshes.
        processor_seconds: the same, as the processor counts them: what else runs on the machine
            does not change them.
        elapsed: the same with loading, evaluation and checkpoints, as a clock on the wall shows it.
    """

    def __init__(self, config: DictConfig, task: Task, workers: Workers, records: Records) -> None:
        """Build the optimizer and the schedule."""
        self.config, self.task, self.workers, self.records = config, task, workers, records
        self.model = workers.wrap_model(task.network)
        self.optimizer = optimizer_of(config, self.model)
        self.optimizer.register_refresh_hook(self._note_refresh)
        self.steps = config.train.epochs * task.steps
        self.schedule = schedule_of(config, self.optimizer, self.steps)
        self.compiled = torch.compile(self.model) if config.train.compile else self.model
        self.epoch = self.batch = self.lines = 0
        self.seconds = self.processor_seconds = self._elapsed_before = 0.0
        self._began = time.perf_counter()
        self.epochs: list[dict[str, Any]] = []
        self.refreshes: list[dict[str, Any]] = []
        self.loss = torch.zeros((), dtype=torch.float64, device=workers.device)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.epoch * self.task.steps + self.batch

    @property
    def elapsed(self) -> float:
        """Seconds of the run, its earlier parts included."""
        return self._elapsed_before + time.perf_counter() - self._began

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; return the steps that were done."""
        state = self.records.load_checkpoint(self.workers.device)
        if state is not None:
            self._refuse_other_settings(state["settings"])
            self._refuse_other_data(state.get("data"))
            self.task.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.batch, self.seconds = state["epoch"], state["batch"], state["seconds"]
            self.epochs, self.refreshes = state["epochs"], state["refreshes"]
            self.loss, self.lines = state["loss"], state["lines"]
            self.processor_seconds = state.get("processor_seconds", self.seconds)
            self._elapsed_before = state.get("elapsed", self.seconds)
        return self.step

    def _refuse_other_settings(self, settings: Mapping[str, Any]) -> None:
        own = flat_settings(self.config)
        other = sorted(k for k in settings | own if settings.get(k) != own.get(k))
        if other:
            raise ValueError(
                f"out: {self.records.folder} holds an unfinished run whose {', '.join(other)} "
                "differ; give another out=DIR, or force=true to start anew"
            )

    def _refuse_other_data(self, data: Mapping[str, str] | None) -> None:
        # Checkpoints of earlier versions do not know their data.
        if data is not None and data != self.task.data_about:
            raise ValueError(
                f"data: {self.records.folder} holds an unfinished run on other data "
                f"({data['preparation']}; now {self.task.data_about['preparation']}); give the "
                "data that it had, another out=DIR, or force=true to start anew"
            )

    def checkpoint_state(self) -> dict[str, Any]:
        """Return what :meth:`resume` needs."""
        return {
            "settings": flat_settings(self.config),
            "data": dict(self.task.data_about),
            "network": self.task.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "elapsed": self.elapsed,
            "epochs": self.epochs,
            "refreshes": self.refreshes,
            "loss": self.loss,
            "lines": self.records.lines,
        }

    def train_to_end(self) -> dict[str, Any]:
        """Train to the end and return what was measured."""
        # A run without a folder is one of many, whose bar stands for all of them.
        silent = not (self.workers.is_first and self.records.folder)
        with step_bar(self.steps, self.step, self.config.method, silent=silent) as bar:
            self._show_refreshes(bar)
            while self.epoch < self.config.train.epochs:
                self._train_epoch(bar)
        self.records.keep_network(self.task.network.state_dict())
        return {
            "metric": self.task.metric,
            "epochs": self.epochs,
            "best": max(m for e in self.epochs if (m := e[self.task.metric]) is not None),
            "last": self.epochs[-1][self.task.metric],
            **self.task.finish(),
            "refreshes": self.refreshes,
            "skipped_steps": self.optimizer.skipped_steps,
            "parameters": sum(p.numel() for p in self.task.network.parameters()),
            "processes": self.workers.size,
            "data": dict(self.task.data_about),
            "seconds": self.seconds,
        }

    def _show_refreshes(self, bar: tqdm) -> None:
        """Show how far a long refresh is, and say if the whole run has only one."""
        geometry = self.optimizer.geometry
        show_refreshes(bar, geometry)
        if bar.disable or geometry is None:
            return
        if self.step == 0 and geometry.refreshes_in(self.steps) == 1:
            bar.write(
                f"llqr.every = {self.config.llqr.every} leaves one refresh in {self.steps:,} "
                "steps: U is learned at the first weights only; take a smaller llqr.every"
            )

    def _train_epoch(self, bar: tqdm) -> None:
        self.task.network.train()
        every = self.config.checkpoint_every
        for batch in self.task.batches(self.epoch, self.batch):
            loss = self.take_step(batch)
            bar.update()
            if self.step % self.config.log_every == 0:
                values = {"loss": float(loss), "lr": self.optimizer.param_groups[0]["lr"]}
                self.records.write_measurement("step", self.step, values)
                bar.set_postfix(loss=f"{values['loss']:.3g}", refresh=False)
            # Not at the end of an epoch: there it is written when the epoch has been evaluated.
            if every and self.step % every == 0 and self.batch < self.task.steps:
                self.records.save_checkpoint(self.checkpoint_state())
        mean = float(self.workers.mean_over_processes(self.loss)) / self.task.steps
        measured = {"train_loss": mean, **self.task.evaluate()}
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss = torch.zeros_like(self.loss)
        times = {
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "elapsed_seconds": self.elapsed,
        }
        values = without_nan({**times, **measured})
        self.epochs.append({"epoch": self.epoch, "step": self.step, **values})
        self.records.write_measurement("epoch", self.step, {"epoch": self.epoch, **values})
        bar.set_postfix({self.task.metric: f"{measured[self.task.metric]:.2f}"}, refresh=False)
        keep_every = self.config.keep_every
        if keep_every and self.epoch % keep_every == 0:
            self.records.keep_network(self.task.network.state_dict(), self.epoch)
        self.records.save_checkpoint(self.checkpoint_state())

    def take_step(self, batch: Any) -> Tensor:
        """Refresh if it is due, and make the next step; return its loss."""
        with self._time_step():
            loss = self._refresh_and_minimize(batch)
        self.loss += loss.detach()
        self.batch += 1
        return loss

    def _refresh_and_minimize(self, batch: Any) -> Tensor:
        step, rank = self.step, self.workers.rank
        torch.manual_seed(seed_of(self.config.seed, "dropout", step, rank))
        if self.optimizer.refresh_due:
            # In the parameters' own precision, and not compiled: it differentiates twice.
            self.optimizer.refresh(self.task.refresh(self.model, step))
        forward = self.task.forward(self.compiled, batch, step)
        loss = self.optimizer.minimize(
            self._in_precision(forward), before_step=self._clip_gradients
        )
        self.schedule.step()
        return loss

    def _clip_gradients(self) -> None:
        if (norm := self.config.train.clip_norm) is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def _in_precision(self, forward: Forward) -> Forward:
        if self.config.train.precision == "float32":
            return forward

        def mixed_forward() -> tuple[Tensor, Tensor]:
            with torch.autocast(self.workers.device.type, torch.bfloat16):
                return forward()

        return mixed_forward

    @contextmanager
    def _time_step(self) -> Iterator[None]:
        began, processor_began = time.perf_counter(), time.process_time()
        yield
        # A wait in every step would keep the device idle; one per epoch makes its time right.
        if self.batch + 1 == self.task.steps:
            self.workers.synchronize()
        self.seconds += time.perf_counter() - began
        self.processor_seconds += time.process_time() - processor_began

    def _note_refresh(self, optimizer: llqr.Optimizer, report: llqr.RefreshReport) -> None:
        values: Mapping[str, Any] = asdict(report)
        self.refreshes.append(without_nan(values))
        self.records.write_measurement(
            "refresh", report.step, {k: v for k, v in values.items() if k != "step"}
        )
