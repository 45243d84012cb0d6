"""Runs of the demo's experiment: the same noise, weights and batches for every method."""

import json

import pytest
import torch

import llqr
from llqr_lab.cli import main
from llqr_lab.common.processes import run_all
from llqr_lab.demo.runs import SETTINGS_FILE, DemoRun, configure_run, run_demo
from llqr_lab.models.small_cnn import small_cnn
from llqr_lab.protocols import DEMO_METHODS, slug
from llqr_lab.recipes.build import optimizer_of
from llqr_lab.recipes.config import compose_config
from llqr_lab.recipes.digits import NoisyDigits
from llqr_lab.recipes.workers import Workers

SETTINGS = {
    "lr": 0.05,
    "rho": 0.1,
    "structure": "kfac",
    "inner_lr": 0.1,
}


def curve(name, **changes):
    history = run_demo(DemoRun(name, SETTINGS | changes, seed=0, epochs=2))
    return history.loss, history.test_accuracy


@pytest.mark.parametrize("name", DEMO_METHODS)
def test_a_method_is_made_of_what_its_name_says(name):
    # Of a structure, if it is given: NG's is the library's default.
    settings = {k: v for k, v in SETTINGS.items() if "LLQR" in name or k in ("lr", "rho")}
    optimizer = optimizer_of(configure_run(DemoRun(name, settings, seed=0)), small_cnn())
    in_bases = name.startswith("GM")
    on_adamw = in_bases or name == "AdamW"
    assert type(optimizer.base) is (torch.optim.AdamW if on_adamw else torch.optim.SGD)
    metrics = {"LLQR": llqr.LLQR, "NG": llqr.NaturalGradient, "GM": llqr.GradientMoments}
    metric = metrics.get(name.partition("+")[0], type(None))
    assert type(optimizer.geometry) is metric
    assert optimizer.transport == ("bases" if in_bases else True)
    assert optimizer.graft == (metric in (llqr.LLQR, llqr.NaturalGradient))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.01 if on_adamw else 5e-4)
    probe = optimizer.perturbation
    assert type(probe) is (llqr.SAM if "SAM" in name else type(None))
    if probe is not None:
        assert (probe.rho, probe.interval) == (0.1, 5 if name.endswith("/5") else 1)
        assert probe.along == ("gradient" if name[:2] in ("NG", "GM") else "metric")
    if metric is llqr.LLQR:
        assert (optimizer.geometry.settings.lr, optimizer.geometry.settings.every) == (0.1, 10)
    library = {
        llqr.NaturalGradient: llqr.NaturalGradient(max_failures=10**9),
        llqr.GradientMoments: llqr.GradientMoments(),
    }.get(metric)
    if library is not None:
        assert optimizer.geometry.settings == library.settings
        assert optimizer.geometry.structure == library.structure


def test_refreshes_disturb_nothing():
    """With U the identity LLQR is SGDM bit for bit: same noise, weights, batches."""
    assert curve("LLQR", structure="identity") == curve("SGDM")


def test_no_probe_is_sgdm():
    assert curve("SAM", rho=0.0) == curve("SGDM")


def test_a_run_repeats_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first = curve("LLQR+SAM")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert curve("LLQR+SAM") == first


def test_the_history_has_what_the_demo_shows():
    history = run_demo(DemoRun("LLQR", SETTINGS, seed=1, epochs=2))
    assert len(history.loss) == len(history.test_accuracy) == 2
    assert history.steps == [11, 22]
    assert 0 < history.seconds[0] < history.seconds[1]
    assert [r.step for r in history.reports] == [0, 10, 20]
    assert 0 < history.train_accuracy < 100 and history.skipped_steps == 0


@pytest.mark.parametrize("name", ["NG+SAM/5", "GM+SAM/5"])
def test_the_recipe_makes_the_demos_run(name, tmp_path, monkeypatch):
    """With the settings of the search, which the protocol has, and the same numbers."""
    monkeypatch.chdir(tmp_path)
    options = ["scale=small", "train.epochs=2", "seed=1", "tracker=none", "out=o"]
    assert main(["run", "demo", f"method={slug(name)}", *options]) == 0
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    settings = json.loads(SETTINGS_FILE.read_text())["methods"][name]["settings"]
    history = run_demo(DemoRun(name, settings, seed=1, epochs=2))
    assert result["changed"] == ["train.epochs"]
    assert [e["test_accuracy"] for e in result["epochs"]] == history.test_accuracy
    assert [e["train_loss"] for e in result["epochs"]] == history.loss
    assert result["train_accuracy"] == history.train_accuracy
    assert [r["change"] for r in result["refreshes"]] == [r.change for r in history.reports]
    assert bool(history.reports) == name.startswith("NG")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="SAM has unknown radius"):
        configure_run(DemoRun("SAM", {"lr": 0.1, "radius": 0.1}, seed=0))


def test_only_the_demos_validation_pictures_can_be_held_out():
    config = compose_config("demo", ["input.holdout=100"])
    with pytest.raises(ValueError, match="input.holdout: expected 0 or 297, got 100"):
        NoisyDigits(config, Workers("cpu"))


@pytest.mark.slow
def test_processes_change_nothing():
    runs = [DemoRun("SGDM", SETTINGS, 0, 1), DemoRun("LLQR+SAM", SETTINGS, 0, 1)]
    alone, together = (run_all(run_demo, runs, workers, "test") for workers in (1, 2))
    assert [h.test_accuracy for h in alone] == [h.test_accuracy for h in together]
    assert [h.loss for h in alone] == [h.loss for h in together]
    changes = [[[r.change for r in h.reports] for h in hs] for hs in (alone, together)]
    assert changes[0] == changes[1]
