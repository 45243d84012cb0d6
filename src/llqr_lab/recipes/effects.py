"""Which keys have an effect on a run: the others are refused, so that none is recorded in vain."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import llqr

from ..models.registry import SMALL, settings_of
from ..protocols import METHODS, slug
from .config import GROUPS, chosen_names, expected_values, source_of, written_keys

__all__ = ["keys_with_effect", "refuse_keys_without_effect", "refuse_unknown_keys"]

# What a run is, where it is written and computed: of every run.
ALWAYS = {"recipe", "dataset", "model", "method", "seed", "scale", "out", "device", "threads"}
ALWAYS |= {"tracker", "force"}
# Of a run that trains, whatever its data.
TRAINING = {"checkpoint_every", "keep_every", "log_every", "train.epochs", "train.schedule"}
TRAINING |= {"train.clip_norm", "train.precision", "train.compile"}
# schedule of the learning rate -> the key that only it reads
OF_SCHEDULE = {"cosine": "train.final_lr", "inverse square root": "train.warmup_steps"}


def keys_with_effect(config: DictConfig, task_keys: Iterable[str]) -> set[str]:
    """Return the keys that change what a run is, does or leaves, as they are typed.

    Args:
        config: of the run, resolved.
        task_keys: what its task reads: the attribute ``keys`` of the task's class.
    """
    method = METHODS[chosen_names(config)["method"]]
    found = ALWAYS | set(task_keys)
    if "train.images" not in found:  # a timing has neither schedule nor checkpoints
        found |= TRAINING
        if config.train.schedule in OF_SCHEDULE:
            found.add(OF_SCHEDULE[config.train.schedule])
    found |= _arguments_in(config, "base", getattr(torch.optim, config.base.optimizer, None))
    found.add("base.optimizer")
    taken = settings_of(config.model.lower()) - {"classes", "image"}
    found |= {f"network.{key}" for key in taken & set(config.network)}
    found |= {"network.small"} if SMALL.get(config.model.lower()) else set()
    if method.metric is not None:
        found |= _arguments_in(config, "llqr", getattr(llqr, method.metric))
        found |= {"optimizer.transport"}
        # Only what goes through U is grafted; nor may graft be refused where it is to be taken off.
        grafts = True in (method.transport, config.optimizer.transport)
        found |= {"optimizer.graft"} if grafts else set()
    if method.curvature is not None:
        found |= {"refresh.batch"}
    else:
        found -= {"refresh.batch"}
    if method.probe is not None:
        found |= _arguments_in(config, "probe", getattr(llqr, str(config.probe.kind), None))
        # Which of the two passes' buffers stay: without a probe there is one pass.
        found |= {"probe.kind", "optimizer.buffers"}
    return found


def _arguments_in(config: DictConfig, group: str, made: Callable[..., Any] | None) -> set[str]:
    """Return the keys of a group that are arguments of what is made of it."""
    # What does not exist is refused where it is made, by its name.
    taken = set(config[group]) if made is None else set(inspect.signature(made).parameters)
    return {f"{group}.{key}" for key in taken & set(config[group])}


def refuse_keys_without_effect(config: DictConfig, task_keys: Iterable[str]) -> None:
    """Refuse what was given and changes nothing.

    Raises:
        ValueError: a key has another value than the protocol's, and nothing in this run reads it.
    """
    effective = keys_with_effect(config, task_keys)
    expected = expected_values(config)
    for key in written_keys(config.recipe):
        group, value = key.rpartition(".")[0], OmegaConf.select(config, key)
        # An argument of the protocol's class that the class given in its place does not have.
        misfit = group in ("base", "probe") and value is not None
        if key in effective or (value == expected[key] and not misfit):
            continue
        others = sorted(k for k in effective if k.rpartition(".")[0] == group)
        known = f"of {group} it has {', '.join(others)}" if others else f"it has none of {group}"
        remedy = f"give {key}=null" if value == expected[key] else "leave it out"
        raise ValueError(
            f"{key}: has no effect on this run: {_reason(config, key)}; {remedy} "
            f"({known if group else 'keys without a group: ' + ', '.join(others)})"
        )


def _reason(config: DictConfig, key: str) -> str:
    """Say why a key is not read."""
    names = chosen_names(config)
    method, named = METHODS[names["method"]], f"method={slug(names['method'])}"
    group = key.rpartition(".")[0]
    of_u = group in ("llqr", "refresh") or key in ("optimizer.transport", "optimizer.graft")
    if of_u and method.metric is None:
        return f"{named} learns no U"
    if group in ("probe", "optimizer") and not of_u and method.probe is None:
        return f"{named} has no perturbation"
    readers = {
        "base": f"torch.optim.{config.base.optimizer} does not take it",
        "llqr": f"llqr.{method.metric} does not take it",
        "refresh": f"{named} has nothing to refresh",
        "probe": f"{config.probe.kind} does not take it",
        "optimizer": f"optimizer.transport={config.optimizer.transport} grafts nothing",
        "network": f"model={names['model']} does not take it, or the data say it",
        "train": f"nothing in {names['name']} with train.schedule={config.train.schedule} reads it",
    }
    return readers.get(group, f"nothing in {names['name']} on {source_of(config)} reads it")


def refuse_unknown_keys(recipe: str, overrides: Sequence[str]) -> None:
    """Refuse ``key=value`` whose key is not there, with the nearest known one.

    Raises:
        ValueError: there is no such key.

    Example:
        >>> refuse_unknown_keys("table1", ["base.lrr=1"])
        Traceback (most recent call last):
        ValueError: base.lrr: there is no such key; did you mean base.lr? ...
    """
    known = written_keys(recipe)
    for override in overrides:
        key, equals, _ = override.partition("=")
        # Hydra's own, and what adds or deletes keys, is Hydra's to judge.
        if not equals or key.startswith(("-", "+", "~", "hydra")) or key in (*known, *GROUPS):
            continue
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        # "rho" is nearer to probe.rho than its letters say.
        near = [k for k in known if k.rpartition(".")[2] == key] or near
        group = [k for k in known if k.startswith(key.partition(".")[0] + ".")]
        meant = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        also = f" {key.partition('.')[0]} has {', '.join(group)}." if group else ""
        raise ValueError(f"{key}: there is no such key; {meant}{also}")
