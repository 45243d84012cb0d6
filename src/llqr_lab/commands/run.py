"""``llqr run RECIPE key=value ...``: make a run of a table or a figure, or many of them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ..data.errors import DataError
from ..recipes.config import CONF, RECIPES
from ..recipes.effects import refuse_unknown_keys
from ..recipes.run import perform_run
from ..recipes.trackers import require_tracker
from ..recipes.workers import leave_together

__all__ = ["add_arguments", "main"]

ABOUT = """\
Makes one run of a table or figure of the paper and writes it below the folder out: its settings,
metrics.jsonl (one line per measurement), and result.json when it is finished. Its curves go to
TensorBoard (tracker=wandb, trackio, mlflow or none: elsewhere).
`llqr table N` and `llqr figure N` collect finished runs. To resume a run that was killed, give the
same command again: it goes on from its last checkpoint and ends with the same weights.
"""
EXAMPLES = """\
examples:
  llqr list                                             the recipes, and what each can run
  llqr run table1 method=llqr-sam scale=small           on digits, in about a minute
  llqr run table1 model=resnet18 method=llqr-sam seed=0 data=/data/cifar10
  llqr run table1 --multirun method=sgdm,sam,llqr-sam seed=0,1,2 data=/data/cifar10
  llqr run table2 method=sam probe.rho=0.1 base.weight_decay=1e-3 data=/data/cifar100
  llqr run table1 method=llqr-sam scale=small tracker=wandb   its curves in Weights & Biases
  llqr run table2 model=timm/convnext_tiny method=llqr-sam input.mixup=0.2 data=/data/cifar100
  llqr run table1 method=llqr-sam --cfg job --resolve   show every value, and run nothing
  torchrun --nproc-per-node 4 -m llqr_lab.cli run table5 method=llqr-f-sam data=/data/imagenet
  llqr run table1 --multirun seed=0,1,2,3,4 data=/data/cifar10 hydra/launcher=submitit_slurm

keys: model, method, dataset, seed, scale (paper, small, smoke), data, out, device, noise, force,
tracker (tensorboard, wandb, trackio, mlflow, none) and those of the groups train, base, llqr,
probe, optimizer, refresh, network, input, report, with the values of the documentation's page
Protocols unless you give others. wandb, trackio and mlflow are installed with pip, each under its
own name.
Slurm needs the extra 'slurm'; model=timm/NAME, model=torchvision/NAME, input.rand_augment,
input.mixup and input.cutmix need the extra 'vision'.
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
    # --out DIR and --out=DIR, as the other commands have it.
    overrides = [
        word.removeprefix("--") if word.startswith("--out=") else word for word in overrides
    ]
    if "--out" in overrides[:-1]:
        at = overrides.index("--out")
        overrides[at : at + 2] = [f"out={overrides[at + 1]}"]
    # Hydra's parser wants all settings in one piece.
    overrides.sort(key=lambda word: word.startswith("-") or "=" not in word)
    try:
        refuse_unknown_keys(arguments.recipe, overrides)
        for word in overrides:
            if word.startswith("tracker="):
                for name in word.removeprefix("tracker=").split(","):
                    require_tracker(name)
            if word.startswith("hydra/launcher=submitit"):
                importlib.import_module("hydra_plugins.hydra_submitit_launcher")
    except ValueError as error:
        print(f"llqr: {error}", file=sys.stderr)
        return 2
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"llqr run {arguments.recipe}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own report is a traceback, whatever the error
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=arguments.recipe)(
            perform_run
        )()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except (DataError, ValueError, HydraException, OmegaConfBaseException) as error:
        if full == "1":
            raise
        # OmegaConf wraps what a value of ours refuses in lines about its own tree.
        told = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        print(f"llqr: {told}\n(HYDRA_FULL_ERROR=1 shows where)", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full
    leave_together()
    return 0
