"""Figures 2 and 3 and the window: the numbers, the pictures, the commands."""

import json

import pytest
import torch

from llqr_lab.cli import main
from llqr_lab.theory import figures, toy_limits, toys
from llqr_lab.theory.toys import VERDICTS, escape_window, verdict_of


def made(name, folder, number):
    assert main(["figure", number, "--out", str(folder)]) == 0
    for suffix in ("png", "csv", "json"):
        assert (folder / f"{name}.{suffix}").stat().st_size > 200
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_figure_2(tmp_path):
    content = made("figure2", tmp_path, "2")
    gd, plain, sam, both = content["summary"]
    assert content["constants"]["starts"] == 168
    for trapped in (gd, plain):
        assert trapped["arrived_percent"] == 0 and trapped["stayed_percent"] == 100
        for step in (5, 10, 20, 40):
            assert trapped[f"median_loss_{step}"] == pytest.approx(6.54, abs=0.005)
    for escaped in (sam, both):
        assert escaped["arrived_percent"] == 100 and escaped["stayed_percent"] == 0
    assert both["steps_mean"] == pytest.approx(12.4, abs=0.1)
    assert both["steps_std"] == pytest.approx(1.2, abs=0.1)
    # Seven radii, one time each from all angles. Reported before: 40.1 +- 35.3, with 1e-24 in the
    # probe's root in the place of 1e-12, which leaves some of the times to rounding.
    assert sam["steps_mean"] == pytest.approx((63 + 41 + 25 + 43 + 24 + 19 + 17) / 7, abs=1e-9)
    assert abs(sam["steps_mean"] - 40.1) < 35.3
    expected = {"SAM": (6.57, 6.17, 0.91, 0.006), "LLQR+SAM": (2.66, 0.59, 0.017, 0.000)}
    for row in (sam, both):
        losses = [row[f"median_loss_{step}"] for step in (5, 10, 20, 40)]
        assert losses == pytest.approx(expected[row["method"]], abs=0.005)


@pytest.mark.slow
def test_figure_3(tmp_path):
    content = made("figure3", tmp_path, "3")
    gd, plain, sam, both = content["summary"]
    assert content["constants"]["schedules"] == 50
    assert content["constants"]["variance"] == 1e-9
    for trapped in (gd, plain):
        assert trapped["arrived_percent"] == 0 and trapped["stayed_percent"] == 100
        assert trapped["path_mean"] <= 0.01
    assert sam["arrived_percent"] == both["arrived_percent"] == 100
    assert both["steps_mean"] == pytest.approx(13.4, abs=0.5)
    # Reported before: SAM 57 +- 25 steps and path 5.54 +- 1.56, LLQR+SAM path 4.06 +- .03. The side
    # of the first kick decides, and with 1e-24 in the root rounding decides the side.
    assert sam["steps_mean"] == pytest.approx(57, abs=25)
    assert sam["path_mean"] == pytest.approx(5.54, abs=1.56)
    assert both["path_mean"] == pytest.approx(4.06, abs=0.1)
    assert both["path_std"] < 0.2 < 1 < sam["path_std"]
    assert 3.80 < both["path_mean"] < sam["path_mean"]


@pytest.mark.slow
def test_the_window():
    etas, rhos = (0.118, 0.132, 0.150, 0.155), (0.05, 0.06, 0.12, 0.15)
    table = escape_window(etas, rhos).verdicts()
    all_hold, only_ours, plain_free, _ = VERDICTS
    assert table == [
        [only_ours] * 4,
        [only_ours] + [all_hold] * 3,
        [only_ours] + [all_hold] * 3,
        [plain_free] * 4,
    ]


def test_verdicts():
    share = {"GD": 0.0, "LLQR": 0.0, "SAM": 1.0, "LLQR+SAM": 1.0}
    assert verdict_of(share) == VERDICTS[0]
    assert verdict_of(share | {"SAM": 0.9}) == VERDICTS[1]
    assert verdict_of(share | {"LLQR": 0.1}) == VERDICTS[2]
    assert verdict_of(share | {"LLQR+SAM": 0.9}) == VERDICTS[3]


def test_leaving_the_swarm_at_arrival_changes_nothing_for_the_rest():
    well = toys.SharpWell()
    ray = torch.zeros(1, dtype=torch.float64)
    starts = toys.at_angles(well.bottom + toys.OFFSETS * well.w, ray)
    U = well.average_inverse()
    eta, rho = (torch.full((7,), x, dtype=torch.float64) for x in (0.118, 0.15))
    inside = toys.which_arrive(well, "SAM", starts, U, eta, rho)
    paths = toys.train_paths(well, "SAM", starts, U, 0.118, 0.15, range(toys.STEPS))
    assert torch.equal(inside, toys.first_arrivals(paths) >= 0)
    assert 0 < int(inside.sum()) < 7


def test_amplitude_and_not_envelope_exceeds_the_well():
    finding = toy_limits.check_criterion(toys.SharpWell())
    assert finding.confirmed
    across, *reach = finding.measured.values()
    # distance .239; SAM: rho and rho eta lambda / (2 - eta lambda) with lambda 10.288
    assert across == pytest.approx(4.80205 - 4.56311, abs=1e-5)
    assert reach[:2] == pytest.approx([0.12, 0.12 * 1.35802 / 0.64198], abs=1e-4)


def test_the_shadow_trap():
    well = toys.SharpWell()
    finding = toy_limits.shadow_trap(well)
    assert finding.confirmed
    assert finding.measured["r at the end"] == pytest.approx(well.bottom - 0.25, abs=1e-9)


def test_sam_retuned_is_llqr_sam_with_a_number_for_u():
    finding = toy_limits.check_isotropy(toys.SharpWell())
    assert finding.confirmed
    gap = [v for k, v in finding.measured.items() if k.startswith("largest gap")]
    assert gap[0] < 1e-9


def test_lengths_stop_at_the_arrival():
    line = torch.stack([torch.tensor([3.0, 2.0, 0.5, 4.0]), torch.zeros(4)], -1)
    paths = {"SAM": torch.stack([line, line + torch.tensor([5.0, 0.0])])}
    toy = toys.Toy(toys.SharpWell(), torch.eye(2), paths, {})
    assert toy.arrivals("SAM").tolist() == [2, -1]
    assert toy.lengths("SAM").tolist() == [2.5, 6.0]
    assert toy.summary("SAM")["arrived_percent"] == 50


def test_the_map_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toys, "STEPS", 40)
    monkeypatch.setattr(toys, "ETAS", (0.132, 0.15))
    monkeypatch.setattr(toys, "RHOS", (0.06, 0.12))
    rows = made("figure-escape-map", tmp_path, "escape-map")
    assert [(row["eta"], row["rho"]) for row in rows] == [
        (0.132, 0.06), (0.132, 0.12), (0.15, 0.06), (0.15, 0.12),
    ]  # fmt: skip
    assert "of 4 settings" in capsys.readouterr().out


def test_another_figure_says_which_exist(tmp_path, capsys):
    assert main(["figure", "7", "--out", str(tmp_path)]) != 0
    said = capsys.readouterr().err
    assert all(name in said for name in figures.FIGURES)
    assert not any(tmp_path.iterdir())
