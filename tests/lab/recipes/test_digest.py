"""The digest of the data: equal for all methods and seeds, another for other data."""

import pytest
import torch

from llqr_lab.recipes.config import compose_config, resolve_config
from llqr_lab.recipes.digest import describe_data
from llqr_lab.recipes.loop import Training
from llqr_lab.recipes.records import Records
from llqr_lab.recipes.run import describe_run, make_task
from llqr_lab.recipes.workers import Workers

PLAIN = ["model=resnet18", "scale=smoke"]


def task_of(recipe, *given):
    config = resolve_config(compose_config(recipe, given))
    return config, make_task(config, Workers("cpu"), describe_run(config))


@pytest.mark.parametrize(
    "given, same",
    [
        (["seed=3", "method=llqr-sam"], True),
        (["noise=0.5"], True),  # drawn by the seed, and the cell's
        (["input.flip=true", "input.cutout_side=0"], True),  # settings, which are recorded
        (["input.limit=50"], False),
        (["input.holdout=40"], False),
    ],
)
def test_a_digest_is_of_the_data_and_nothing_else(given, same):
    (_, plain), (_, other) = (task_of("table1", *PLAIN, *more) for more in ([], given))
    assert (plain.data_about["digest"] == other.data_about["digest"]) == same


@pytest.mark.parametrize("given", [[], ["input.holdout=297"]])
def test_the_demos_digest_is_that_of_all_seeds(given):
    seeds = [task_of("demo", f"seed={seed}", *given)[1].data_about for seed in (0, 5)]
    assert seeds[0] == seeds[1]
    assert (seeds[0] == task_of("demo")[1].data_about) is (not given)


def test_shapes_kinds_and_words_count():
    x = torch.arange(6)
    found = [
        describe_data("a", x),
        describe_data("b", x),
        describe_data("a", x.view(2, 3)),
        describe_data("a", x.int()),
        describe_data("a", "x", "y"),
        describe_data("a", "xy"),
    ]
    assert len({one["digest"] for one in found}) == len(found)


def test_a_checkpoint_on_other_data_is_refused(tmp_path):
    config, task = task_of("table1", *PLAIN)
    run = Training(config, task, Workers("cpu"), Records(tmp_path))
    run.records.save_checkpoint(run.checkpoint_state())
    task.data_about = describe_data("other pictures")
    with pytest.raises(ValueError, match="data: .*unfinished run on other data .*96 and 96 pict"):
        Training(config, task, Workers("cpu"), Records(tmp_path)).resume()
