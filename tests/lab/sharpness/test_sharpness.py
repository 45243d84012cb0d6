"""llqr sharpness: the network of a run, measured, written and drawn."""

import json

import pytest
import torch

from llqr import sharpness
from llqr_lab.cli import main
from llqr_lab.commands import sharpness as command
from llqr_lab.recipes.config import compose_config, flat_settings, resolve_config
from llqr_lab.recipes.run import describe_run, make_task
from llqr_lab.recipes.trained import config_of_run, load_trained, training_forwards
from llqr_lab.recipes.workers import Workers


@pytest.mark.parametrize(
    "recipe, overrides",
    [
        ("table1", ["scale=smoke", "method=llqr-sam", "train.batch=7", "noise=0.2", "seed=3"]),
        ("table6", ["scale=small", "method=llqr-sam"]),
        ("demo", ["method=llqr-sam"]),
    ],
)
def test_the_configuration_of_a_run_is_found_again(recipe, overrides):
    about = describe_run(resolve_config(compose_config(recipe, overrides)))
    stored = json.loads(json.dumps(about))
    found = config_of_run(stored, data=None, device="cpu")
    assert flat_settings(found) == stored["settings"]
    assert json.loads(json.dumps(describe_run(found))) == stored


@pytest.fixture
def folder(tmp_path):
    """A run's folder, with the network as it starts."""
    config = resolve_config(
        compose_config("table8", ["scale=smoke", "model=resnet18", "method=sgdm", "device=cpu"])
    )
    about = describe_run(config)
    network = make_task(config, Workers("cpu"), about).network
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.01)
    (tmp_path / "config.json").write_text(json.dumps(about))
    torch.save(network.state_dict(), tmp_path / "network.pt")
    return tmp_path


def few_measures(task, arguments):
    forwards, network = training_forwards(task, arguments.batches), task.network
    return {
        "eigenvalues": lambda: sharpness.eigenvalues(forwards, network, 2, tolerance=0.1),
        "density": lambda: sharpness.density(forwards, network, steps=3, probes=2),
        "landscape": lambda: sharpness.landscape(forwards, network, points=arguments.points),
    }


def test_measuring_a_run(folder, monkeypatch, capsys):
    _, task = load_trained(folder, device="cpu")
    weights = torch.load(folder / "network.pt", weights_only=True)
    assert all(torch.equal(v, weights[n]) for n, v in task.network.state_dict().items())
    assert set(few_measures(task, ARGUMENTS)) < set(command.measures_of(task, ARGUMENTS))
    monkeypatch.setattr(command, "measures_of", few_measures)
    words = ["--batches", "2", "--points", "3", "--device", "cpu"]
    assert main(["sharpness", str(folder), *words]) == 0
    out = folder / "sharpness"
    names = ["density", "eigenvalues", "landscape"]
    pictures = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*pictures, "sharpness.json"])
    content = json.loads((out / "sharpness.json").read_text())
    assert content["model"] == "resnet18" and content["eigenvalues"]["batches"] == 2
    assert len(content["landscape"]["losses"]) == 3 and "directions" not in content["landscape"]
    assert "largest eigenvalues of Newton()" in capsys.readouterr().out


class ARGUMENTS:
    batches, points, rho = 1, 3, 0.05


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["sharpness", str(tmp_path)]) == 2
    assert "there is no run here" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["sharpness", str(tmp_path)]) == 2
    assert "no weights" in capsys.readouterr().err
