"""The configuration of a run: Hydra's files, with the values of the protocols in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as _compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ..common.vision import is_packaged
from ..protocols import EXPERIMENTS, METHODS, Experiment, Setting, resolve_settings, slug

__all__ = [
    "CONF",
    "GROUPS",
    "RECIPES",
    "changed_keys",
    "chosen_names",
    "compose_config",
    "expected_values",
    "flat_settings",
    "given_values",
    "resolve_config",
    "source_of",
    "written_keys",
]

CONF = Path(__file__).parent / "conf"
RECIPES = [name for name in EXPERIMENTS if (CONF / f"{name}.yaml").exists()]
# group of the configuration: the protocols' word for it
GROUPS = {
    "train": "train",
    "base": "base",
    "llqr": "llqr",
    "refresh": "refresh",
    "probe": "probe",
    "optimizer": "optimizer",
    "network": "model",
    "input": "data",
    "report": "report",
}


def _match_name(what: str, text: str, names: Any) -> str:
    for name in names:
        if text.lower() in (name.lower(), slug(name)):
            return name
    raise ValueError(f"{what}: expected one of {', '.join(map(slug, names))}, got {text!r}")


def _match_model(text: str, experiment: Experiment) -> str:
    if experiment.takes_model(text):
        return text
    if is_packaged(text):
        raise ValueError(
            f"model: {text} classifies pictures, which is not the task here; expected one of "
            f"{', '.join(experiment.models)}"
        )
    try:
        return _match_name("model", text, experiment.models)
    except ValueError as error:
        if not experiment.takes_pictures:
            raise
        raise ValueError(f"{error} (or timm/NAME, torchvision/NAME)") from None


def chosen_names(config: DictConfig) -> dict[str, str]:
    """Return the recipe's name and the run's dataset, model, method and scale.

    Raises:
        ValueError: the recipe has no such dataset, model or method.
    """
    experiment = EXPERIMENTS[config.recipe]
    return {
        "name": config.recipe,
        "dataset": _match_name("dataset", config.dataset, experiment.datasets),
        "model": _match_model(config.model, experiment),
        "method": _match_name("method", config.method, experiment.methods),
        "scale": config.scale,
    }


_resolved = cache(resolve_settings)  # a configuration asks for every key by itself


def _resolve_protocol(key: str, *, _root_: DictConfig) -> Any:
    return _value_in(_resolved(**chosen_names(_root_)), key, _root_)


def _value_in(protocol: Mapping[str, Setting], key: str, config: DictConfig) -> Any:
    """Return what the protocol says of a key, or the configuration of the key that it follows."""
    if key not in protocol:
        return None
    if leader := protocol[key].follows:
        word, _, name = leader.partition(".")
        return config[_group_of(word)][name]
    return _as_lists(protocol[key].value)


def _group_of(word: str) -> str:
    """Return the group of the configuration that the protocols call so."""
    return next(group for group, own in GROUPS.items() if own == word)


def _as_lists(value: Any) -> Any:
    """Return tuples as lists, which is what the configuration knows."""
    return [_as_lists(v) for v in value] if isinstance(value, tuple) else value


def _resolve_first(attribute: str, *, _root_: DictConfig) -> str:
    return slug(getattr(EXPERIMENTS[_root_.recipe], attribute)[0])


# replace: a module may be imported again, by another name or in a notebook.
OmegaConf.register_new_resolver("protocol", _resolve_protocol, replace=True)
OmegaConf.register_new_resolver("first", _resolve_first, replace=True)


def compose_config(recipe: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the configuration of a recipe, as the command line makes it.

    Example:
        >>> config = compose_config("table1", ["method=llqr-sam", "model=resnet18"])
        >>> config.probe.rho, config.llqr.every, config.llqr.curvature
        (0.1, 500, 'fisher')
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return _compose(recipe, list(overrides))


def resolve_config(config: DictConfig) -> DictConfig:
    """Return the configuration with every value in its place.

    A value of the protocols costs a millisecond each time it is asked for; a step asks for several.

    Raises:
        ValueError: the recipe has no such dataset, model or method, or a value is not one that its
            key can have.
    """
    _resolved(**chosen_names(config))  # what it refuses OmegaConf would wrap in lines of its own
    # Not OmegaConf.resolve: it has no place for a list that a resolver returns.
    whole = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    _refuse_wrong_values(whole)
    OmegaConf.set_struct(whole, True)
    return whole


#: Groups in which a number can be nothing else; words such as ``llqr.lr=auto`` the library judges.
NUMBERS_ONLY = ("", "train", "base", "refresh", "input")


#: The least and the greatest value of what would be refused, or be wrong, only in a run.
LIMITS = {
    **dict.fromkeys(("train.epochs", "train.batch"), (1, math.inf)),
    **dict.fromkeys(("checkpoint_every", "log_every"), (1, math.inf)),
    **dict.fromkeys(("keep_every", "train.warmup_steps", "train.final_lr"), (0, math.inf)),
    "train.label_smoothing": (0, 1),
}
PRECISIONS = ("float32", "bfloat16")


def _refuse_wrong_values(config: DictConfig) -> None:
    """Refuse what a key cannot be, before anything is recorded under it."""
    _refuse_other_types(config)
    for key, (low, high) in LIMITS.items():
        value = OmegaConf.select(config, key)
        if value is not None and not low <= value <= high:
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{key}: expected a number {limit}, got {value!r}")
    if (precision := config.train.precision) not in PRECISIONS:
        raise ValueError(
            f"train.precision: expected {' or '.join(PRECISIONS)}, got {precision!r}; "
            "float16 needs a gradient scaler, which these runs do not have"
        )


def _refuse_other_types(config: DictConfig) -> None:
    """Refuse words in the place of numbers."""
    for key, usual in expected_values(config).items():
        value = OmegaConf.select(config, key)
        if key.rpartition(".")[0] not in NUMBERS_ONLY or value is None or usual is None:
            continue
        if isinstance(usual, bool):
            fits, kind = isinstance(value, bool), "true or false"
        elif isinstance(usual, int) and "." not in key:
            fits, kind = type(value) is int, "an integer"
        elif isinstance(usual, (int, float)):
            fits, kind = type(value) in (int, float), "a number"
        else:
            continue
        if not fits:
            raise ValueError(f"{key}: expected {kind}, got {value!r}")


def source_of(config: DictConfig) -> str:
    """Return the name of the data that are read: the dataset itself, or what stands in for it."""
    return config.read or config.dataset


def given_values(group: DictConfig, *without: str) -> dict[str, Any]:
    """Return what a group of the configuration says: its values that are not null."""
    values = OmegaConf.to_container(group, resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items() if v is not None and k not in without}


def flat_settings(config: DictConfig) -> dict[str, Any]:
    """Return the run's settings by the keys of the protocols, without those it has no use for."""
    method = METHODS[chosen_names(config)["method"]]
    values = {
        f"{word}.{key}": config[group][key]
        for group, word in GROUPS.items()
        for key in config[group]
    }
    values = {k: OmegaConf.to_object(v) if OmegaConf.is_list(v) else v for k, v in values.items()}
    return {"noise": config.noise, "read": source_of(config)} | {
        k: v for k, v in values.items() if v is not None and method.uses_setting(k)
    }


@cache
def written_keys(recipe: str) -> dict[str, Any]:
    """Return what a recipe's files say of each key, by the keys as they are typed.

    What the protocol says stands there as ``${protocol:...}``.

    Example:
        >>> written_keys("table8")["noise"], written_keys("table8")["base.lr"]
        (0.2, '${protocol:base.lr}')
    """
    files = (OmegaConf.load(CONF / f"{name}.yaml") for name in ("run", recipe))
    written = OmegaConf.to_container(OmegaConf.merge(*files))
    assert isinstance(written, dict)
    found: dict[str, Any] = {}
    for key, value in written.items():
        if key in GROUPS:
            found |= {f"{key}.{name}": one for name, one in value.items()}
        elif key not in ("defaults", "hydra"):
            found[str(key)] = value
    return found


def expected_values(config: DictConfig) -> dict[str, Any]:
    """Return the value that each key has if nothing is given, by the keys as they are typed."""
    protocol = _resolved(**chosen_names(config))

    def expected_value(written: Any) -> Any:
        if not isinstance(written, str) or not written.startswith("${protocol:"):
            return written
        key = written.removeprefix("${protocol:").removesuffix("}")
        return _value_in(protocol, key, config)

    return {key: expected_value(written) for key, written in written_keys(config.recipe).items()}


def changed_keys(config: DictConfig) -> list[str]:
    """Return the settings whose values are not the protocol's at this scale.

    The share of wrong labels belongs to the cell, as a table has a column for each.
    """
    expected = expected_values(config)
    typed = {
        f"{word}.{key}": f"{group}.{key}" for group, word in GROUPS.items() for key in config[group]
    }
    found = []
    for key, value in flat_settings(config).items():
        usual = expected.get(typed.get(key, key))  # None: a key that was added, +network.KEY
        if key == "noise" or (key == "read" and usual is None):
            continue
        if value != usual:
            found.append(key)
    return found
