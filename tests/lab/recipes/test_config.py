"""The configurations of all runs are those of the protocols."""

import itertools
import re

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from torch import nn

from llqr_lab.protocols import EXPERIMENTS, METHODS, resolve_settings, slug
from llqr_lab.recipes.build import optimizer_of
from llqr_lab.recipes.config import (
    GROUPS,
    RECIPES,
    changed_keys,
    chosen_names,
    compose_config,
    flat_settings,
    resolve_config,
)

# What a protocol says beside the settings of a run: how things are reported, searched, swept,
# and remarks whose value is the code's own behaviour.
REMARKS = {
    "train.schedule_unit",
    "train.weight_decay_after_u",
    "refresh.data",
    "data.normalise",
    "data.statistics",
    "data.crop",
    "data.cutout",
    "data.cutout_probability",
    "data.test",
    "data.noise",
    "data.noise_of",
    "data.flip_to",
    "data.preparation",
    "data.lower_case",
    "data.max_length",
    "data.max_ratio",
    "data.read",
    "model.source",
}
RUNS = [
    (recipe, dataset, model, method)
    for recipe in RECIPES
    for dataset, model, method in itertools.product(
        EXPERIMENTS[recipe].datasets, EXPERIMENTS[recipe].models, EXPERIMENTS[recipe].methods
    )
]


@pytest.fixture(scope="module")
def configurations():
    return {recipe: compose_config(recipe) for recipe in RECIPES}


def test_every_experiment_that_runs_has_a_recipe():
    assert set(EXPERIMENTS) - set(RECIPES) == {"figure1", "figure4", "figure5"}


@pytest.mark.parametrize("scale", ["paper", "small", "smoke"])
def test_configurations_are_the_protocols(configurations, scale):
    # The smaller scales change the same few values of many runs: every fifth is enough.
    for recipe, dataset, model, method in RUNS if scale == "paper" else RUNS[::5]:
        config = configurations[recipe]
        config.update(dataset=slug(dataset), model=slug(model), method=slug(method), scale=scale)
        protocol = resolve_settings(recipe, dataset, model, method, scale)
        expected = {
            key: OmegaConf.to_container(OmegaConf.create([setting.value]))[0]
            for key, setting in protocol.items()
            if key.split(".")[0] in set(GROUPS.values()) - {"report"}
            and key not in REMARKS
            and setting.value is not None
        }
        found = flat_settings(config)
        assert {k: found.get(k) for k in expected} == expected, (recipe, dataset, model, method)
        extra = set(found) - set(expected) - {"noise", "read", "llqr.shard", "data.holdout"}
        assert all(key.startswith("report.") for key in extra), extra
        assert changed_keys(config) == []


def test_what_is_given_replaces_the_protocol():
    config = compose_config(
        "table1", ["method=llqr-sam", "llqr.structure=diagonal", "base.lr=0.05"]
    )
    assert flat_settings(config)["llqr.structure"] == "diagonal"
    assert changed_keys(config) == ["llqr.structure"]  # 0.05 is the protocol's


def test_typing_errors_are_refused():
    with pytest.raises(Exception, match="lrr"):
        compose_config("table1", ["base.lrr=1"])
    with pytest.raises(ConfigAttributeError):
        _ = compose_config("table1").base.lrr


@pytest.mark.parametrize(
    "given, said",
    [
        ("seed=abc", "seed: expected an integer, got 'abc'"),
        ("seed=0.5", "seed: expected an integer, got 0.5"),
        ("base.lr=fast", "base.lr: expected a number, got 'fast'"),
        ("force=1", "force: expected true or false, got 1"),
        ("train.epochs=0", "train.epochs: expected a number at least 1, got 0"),
        ("train.label_smoothing=2", "expected a number between 0 and 1, got 2"),
        ("train.precision=float16", "train.precision: expected float32 or bfloat16, got 'float16'"),
    ],
)
def test_values_that_a_key_cannot_have(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        resolve_config(compose_config("table1", [given]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_a_method_a_recipe_has_its_first(recipe):
    method = chosen_names(compose_config(recipe))["method"]
    assert method == EXPERIMENTS[recipe].methods[0]


@pytest.mark.parametrize(
    "key, value, known",
    [("method", "sgd", "sgdm, llqr"), ("model", "resnet", "resnet18"), ("dataset", "mnist", "cif")],
)
def test_unknown_names_are_answered_with_the_known(key, value, known):
    with pytest.raises(ValueError, match=f"{key}: expected one of .*{known}.*, got '{value}'"):
        chosen_names(compose_config("table1", [f"{key}={value}"]))


def test_names_are_typed_in_any_case_or_in_full():
    config = compose_config("table1", ["method='LLQR+SAM (NGD)'", "dataset=CIFAR-10"])
    assert chosen_names(config)["method"] == "LLQR+SAM (NGD)"
    assert chosen_names(config)["dataset"] == "CIFAR-10"
    assert len({slug(name) for name in METHODS}) == len(METHODS)


@pytest.mark.parametrize(
    "overrides, start, changed",
    [
        ([], 4000, []),
        (["train.warmup_steps=100"], 100, ["train.warmup_steps"]),
        (["probe.start=7"], 7, ["probe.start"]),
        (["scale=small"], 200, []),
        (["scale=smoke"], 0, []),  # so few steps
    ],
)
def test_the_probe_starts_after_the_warm_up_unless_told_otherwise(overrides, start, changed):
    config = compose_config("table6", ["method=llqr-sam", *overrides])
    assert config.probe.start == start and changed_keys(config) == changed


def test_translation_has_whole_blocks_as_the_authors():
    """The embeddings' factors of 8,848 x 8,848 and 6,632 x 6,632 included."""
    config = compose_config("table6", ["method=llqr"])
    optimizer = optimizer_of(config, nn.Sequential(nn.Embedding(600, 4), nn.Linear(4, 3)))
    factors = optimizer.geometry.state()["0.weight"]
    assert factors["QB.0"].shape == (600, 600) and "QB.1" not in factors


@pytest.mark.parametrize("recipe", [f"table{n}" for n in (*range(1, 9), 10)])
@pytest.mark.parametrize("norms", [None, "batch"])
def test_a_refresh_sees_the_authors_evaluation_mode_or_what_training_sees(recipe, norms):
    method = "llqr-f-sam" if recipe in ("table4", "table5") else "llqr-sam"
    words = [f"method={method}", *([f"llqr.batch_norm={norms}"] if norms else [])]
    config = compose_config(recipe, words)
    optimizer = optimizer_of(config, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert optimizer.geometry.settings.batch_norm == (norms or "running")
    assert changed_keys(config) == (["llqr.batch_norm"] if norms == "batch" else [])
