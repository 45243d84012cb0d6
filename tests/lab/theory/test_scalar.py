"""Hovering, vanilla SAM and escape: the exact numbers."""

import numpy as np
import pytest

from llqr_lab.theory import escape, hovering, vanilla_sam

EXACT = 1e-10


def of(findings, part):
    (one,) = [f for f in findings if part in f.statement]
    assert one.confirmed
    return one


@pytest.fixture(scope="module")
def hover():
    return hovering.check_hovering()


def test_the_two_cycle_is_exact_and_diverges_at_two(hover):
    finding = of(hover, "limsup")
    errors = list(finding.measured.values())
    assert finding.verdict == "holds with limits"
    assert max(errors[:2]) < EXACT
    assert errors[2] == pytest.approx(1, abs=EXACT)


def test_the_map_has_no_other_fixed_point(hover):
    assert of(hover, "fixed point").verdict == "holds"


def test_the_envelope_is_no_bound_above_one(hover):
    ratios = list(of(hover, "at most about").measured.values())
    assert ratios == pytest.approx([1 / 3, 1, 1.5, 3, 19], rel=EXACT)


def test_the_amplitude_depends_on_the_sharp_curvature(hover):
    ratios = list(of(hover, "does not depend").measured.values())
    mu = 1 + np.array([0.1, 0.5, 1.5, 3.0]) / 0.1
    assert ratios == pytest.approx(list(0.05 * mu / (2 - 0.05 * mu)), rel=EXACT)


def test_only_the_largest_mu_hovers(hover):
    *others, largest = of(hover, "every eigendirection").measured.values()
    assert max(others) < EXACT and largest == pytest.approx(1, abs=EXACT)


def test_tied_directions_share_the_amplitude(hover):
    assert of(hover, "have the largest").measured.popitem()[1] < EXACT


@pytest.fixture(scope="module")
def against_sam():
    return vanilla_sam.check_vanilla_sam()


def test_corollary_b2_is_misprinted(against_sam):
    finding = of(against_sam, "as printed")
    assert finding.verdict == "erratum"
    assert finding.measured["measured at avg 0.1"] == pytest.approx(0.1**-0.5, rel=EXACT)
    assert finding.measured["largest relative error of 1/sqrt(avg)"] < EXACT
    assert finding.measured["median relative error of 1/sqrt(lambda_eps)"] > 0.5


def test_at_the_same_step_the_ratio_is_another(against_sam):
    exact, corollary = of(against_sam, "same learning rate").measured.values()
    assert exact < EXACT and corollary > 0.5


def test_above_one_it_shrinks(against_sam):
    ratios = list(of(against_sam, "amplifies").measured.values())
    assert ratios == pytest.approx([2, 1, 0.5], rel=EXACT)


def test_vanilla_sam_hovers_at_rho_up_to_the_same_factor(against_sam):
    assert of(against_sam, "recursion of vanilla").measured["largest error"] < EXACT
    ratios = list(of(against_sam, "hovers at about rho").measured.values())
    assert ratios == pytest.approx([1 / 3, 1, 3], rel=EXACT)


def test_the_envelope_is_no_exit_condition():
    criterion, exact = escape.check_escape()
    assert list(criterion.measured.values()) == [100_000, 1]
    settings, ours, papers = exact.measured.values()
    assert ours == 0 and papers > settings / 10
    assert criterion.confirmed and exact.confirmed


def test_a_wrong_amplitude_is_noticed(monkeypatch):
    monkeypatch.setattr(
        hovering, "two_cycle_amplitude", lambda eta, rho, mu, average: rho / average**0.5
    )
    assert hovering.two_cycle().verdict == "NOT CONFIRMED"
