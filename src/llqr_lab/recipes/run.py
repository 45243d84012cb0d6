"""``llqr run RECIPE key=value ...``: make a run of a table or a figure, or many of them."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ..data.errors import DataError
from ..environment import environment
from ..protocols import slug
from .cadence import cadence
from .config import CONF, RECIPES, changed, chosen, flat, resolved, source_of
from .images import Classification, FolderClassification
from .loop import Training
from .records import Records
from .task import Task
from .text import Translation
from .workers import Workers

__all__ = ["add_arguments", "describe", "folder_of", "main", "measure", "perform"]

ABOUT = """\
Makes one run of a table or figure of the paper and writes it below the folder out: its settings,
metrics.jsonl (a line a measurement), TensorBoard's events, and result.json when it is finished.
`llqr table N` and `llqr figure N` collect finished runs. A run that was killed goes on from its
last checkpoint when the same command is given again, and ends with the same weights.
"""
EXAMPLES = """\
examples:
  llqr list                                             the recipes, and what each can run
  llqr run table1 method=llqr-sam scale=small           on digits, in about a minute
  llqr run table1 model=resnet18 method=llqr-sam seed=0 data=/data/cifar10
  llqr run table1 --multirun method=sgdm,sam,llqr-sam seed=0,1,2 data=/data/cifar10
  llqr run table2 method=sam probe.rho=0.1 base.weight_decay=1e-3 data=/data/cifar100
  llqr run table1 method=llqr-sam --cfg job --resolve   show every value, and run nothing
  torchrun --nproc-per-node 4 -m llqr_lab.cli run table5 method=llqr-f-sam data=/data/imagenet
  llqr run table1 --multirun seed=0,1,2,3,4 data=/data/cifar10 hydra/launcher=submitit_slurm

keys: model, method, dataset, seed, scale (paper, small, smoke), data, out, device, noise, force and
those of the groups train, base, llqr, probe, optimizer, refresh, network, input, report, with the
values of docs/protocols.md unless you give others. Slurm needs the extra 'slurm'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and what follows it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = ABOUT, EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="key=value",
        help="settings, and Hydra's options such as --multirun",
    )


def main(arguments: argparse.Namespace) -> int:
    """Make the run or the runs; 0 when all are finished."""
    import hydra

    if arguments.recipe not in RECIPES:
        print(
            f"llqr: there is no recipe {arguments.recipe!r}; there are: {', '.join(RECIPES)}",
            file=sys.stderr,
        )
        return 2
    overrides = list(arguments.overrides)
    # --out DIR, as the other commands have it.
    if "--out" in overrides[:-1]:
        at = overrides.index("--out")
        overrides[at : at + 2] = [f"out={overrides[at + 1]}"]
    # Hydra's parser wants all settings in one piece.
    overrides.sort(key=lambda word: word.startswith("-") or "=" not in word)
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"llqr run {arguments.recipe}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own report is a traceback, whatever the error
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=arguments.recipe)(
            perform
        )()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except (DataError, ValueError, HydraException, OmegaConfBaseException) as error:
        if full == "1":
            raise
        print(f"llqr: {error}\n(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    _leave()
    return 0


def folder_of(about: dict[str, Any], out: str) -> Path:
    """Return the folder of a run: its name says what it is, and differs for other settings."""
    names = (slug(about[k]) for k in ("dataset", "model", "method"))
    name = f"seed{about['seed']}"
    if about["noise"]:
        name = f"noise{about['noise']:g}-{name}"
    own = {key: about["settings"].get(key) for key in about["changed"]}
    if own:
        text = json.dumps(own, sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Path(out, about["recipe"], about["scale"], *names, name)


def perform(config: DictConfig) -> None:
    """Make one run, or go on with it, unless it is finished."""
    workers = Workers(config.device)
    if workers.device.type == "cpu":
        torch.set_num_threads(config.threads)
    config = resolved(config)
    about = describe(config)
    folder = folder_of(about, config.out)
    records = Records(folder, writes=workers.first, tensorboard=config.tensorboard)
    if (found := records.result) is not None and not config.force:
        if found["settings"] != about["settings"]:
            raise ValueError(
                f"out: {folder} holds a finished run with other settings; give another out=DIR, or "
                "force=true to replace it"
            )
        _say(workers, f"{folder}: finished before; force=true runs it again")
        return
    if config.force and workers.first:
        for name in ("result.json", "checkpoint.pt"):
            (folder / name).unlink(missing_ok=True)
    try:
        measured = measure(config, workers, records, about)
        finished = datetime.datetime.now().isoformat(timespec="seconds")
        records.finish(
            {
                **about,
                **measured,
                "environment": environment(config.threads, workers.device),
                "finished": finished,
            }
        )
    finally:
        records.close()
    _say(workers, f"{folder / 'result.json'}: {_short(measured)}")


def describe(config: DictConfig) -> dict[str, Any]:
    """Return what a run is: its names, seed and settings."""
    run = chosen(config)
    return {
        "recipe": config.recipe,
        "scale": config.scale,
        **{k: run[k] for k in ("dataset", "model", "method")},
        "source": source_of(config),
        "noise": config.noise,
        "seed": config.seed,
        "settings": flat(config),
        "changed": changed(config),
    }


def measure(
    config: DictConfig, workers: Workers, records: Records, about: dict[str, Any]
) -> dict[str, Any]:
    """Return what a run measures.

    Args:
        config: resolved.
        workers: the processes.
        records: where it leaves its traces.
        about: what :func:`describe` says of it.
    """
    with warnings.catch_warnings():
        # Both are counted in the result.
        warnings.filterwarnings("ignore", "a refresh was refused")
        warnings.filterwarnings("ignore", "a step was skipped")
        if config.recipe in ("table10", "figure6"):
            records.begin(about)
            return cadence(config, workers)
        training = Training(config, _task(config, workers, about), workers, records)
        done = training.resume()
        if done:
            _say(workers, f"{records.folder}: goes on at step {done} of {training.steps}")
        records.begin(about, done, training.lines)
        return training.run()


def _task(config: DictConfig, workers: Workers, about: dict[str, Any]) -> Task:
    if about["model"] == "transformer-iwslt":
        return Translation(config, workers)
    images = FolderClassification if about["source"].lower() == "imagenet" else Classification
    return images(config, workers)


def _short(measured: dict[str, Any]) -> str:
    if "timing" in measured:
        return f"{measured['timing']['epoch_seconds']:.1f} s an epoch"
    return (
        f"{measured['metric']} {measured['last']:.2f} (best {measured['best']:.2f}), "
        f"{measured['seconds']:.0f} s"
    )


def _say(workers: Workers, text: str) -> None:
    if workers.first:
        print(text, flush=True)


def _leave() -> None:
    """Let the processes part: nobody leaves while another still sends.

    Not after an error: the others may wait for what this one will never send, and torchrun ends
    them when it leaves.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
