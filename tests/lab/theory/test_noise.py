"""Propositions B.3 and B.4 by simulation."""

import numpy as np
import pytest

from llqr_lab.theory import damping, selection


def test_variance_and_motion():
    for finding in damping.check_damping():
        assert finding.confirmed
    low, high, _ = damping.check_formulas().measured.values()
    assert 0.9955 < low <= high < 1.0045


def test_another_variance_is_noticed(monkeypatch):
    monkeypatch.setattr(
        damping,
        "stationary_variance",
        lambda eta, h, d, tau: eta * tau**2 / (h * (2 * d - 0.9 * eta * h)),
    )
    assert damping.check_formulas().verdict == "NOT CONFIRMED"


def test_the_larger_denominator_damps_both():
    for small, large in ((0.3, 0.4), (1.0, 5.0)):
        for moment in (damping.stationary_variance, damping.mean_squared_step):
            assert moment(0.3, 1.0, large, 1.0) < moment(0.3, 1.0, small, 1.0)


def test_occupation_of_unstable_wells():
    finding = selection.check_scaling()
    assert finding.confirmed
    *ratios, flat = finding.measured.values()
    # 5000 exits a number: 1.2 % standard error of the flat time, 5 % is four of them.
    assert ratios == pytest.approx([4.0, 5.0, 5.4, 5.7, 5.95], rel=0.05)
    assert flat > 0.95


def test_a_hovering_well_is_not_left_in_logarithmic_time():
    finding = selection.check_hypothesis()
    assert finding.confirmed
    assert finding.measured["steps at sigma 0.14, kick .75 R"] > 800
    assert finding.measured["steps at most, kick 1.25 R"] < 4


def test_exit_times_of_known_walks():
    # Wald: the flat walk has E tau = E z^2 / sigma^2, a little above R^2 / sigma^2.
    assert 100 < selection.exit_steps(selection.flat_step, 0.1, 4000) < 120
    assert selection.exit_steps(lambda z: z + 0.3, 1e-9, 10) == 4
    assert np.isinf(selection.exit_steps(lambda z: 0 * z, 1e-9, 10, limit=50))
