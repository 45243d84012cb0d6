"""How times become an epoch's time."""

import pytest

from llqr_lab.recipes.cadence import _summarise_times
from llqr_lab.recipes.config import compose_config


def test_the_first_refresh_is_left_out_above_the_later_ones():
    config = compose_config("table10", ["method=llqr", "scale=small"])
    timing = _summarise_times(config, [1.0] * 8, [10.0, 2.0, 4.0], steps=4)["timing"]
    assert timing["epoch_seconds"] == (8 + 16) / 2  # two epochs
    assert timing["update_seconds"] == 3.0
    assert timing["epoch_seconds_without"] == (8 + 16 - 7) / 2
    assert timing["step_seconds"] == 1.0 and timing["every"] == 10


@pytest.mark.parametrize("refreshes, later, without", [([], None, 4.0), ([6.0], None, 4.0)])
def test_no_refresh_or_one_alone(refreshes, later, without):
    config = compose_config("table10", ["method=llqr", "scale=small"])
    timing = _summarise_times(config, [1.0] * 8, refreshes, steps=4)["timing"]
    assert timing["update_seconds"] is later
    assert timing["epoch_seconds_without"] == without
