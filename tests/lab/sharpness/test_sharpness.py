"""llqr sharpness: the network of a run, measured, written and drawn."""

import json
from dataclasses import replace

import pytest
import torch

from llqr import sharpness
from llqr_lab.cli import main
from llqr_lab.commands import sharpness as command
from llqr_lab.recipes.config import compose_config, flat_settings, resolve_config
from llqr_lab.recipes.run import describe_run, make_task
from llqr_lab.recipes.trained import config_of_run, load_trained, training_data
from llqr_lab.recipes.workers import Workers
from llqr_lab.sharpness.over_epochs import Course, lines_of, refuse_unequal


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
    forward, batches = training_data(task, arguments.batches)
    given, more = (forward, task.network), {"batches": batches}
    line = [[torch.ones_like(p) for p in task.network.parameters()]]
    return {
        "eigenvalues": lambda: sharpness.eigenvalues(*given, 2, tolerance=0.1, **more),
        "density": lambda: sharpness.density(*given, steps=3, probes=2, **more),
        "line": lambda: sharpness.landscape(*given, line, radius=1e-3, points=3, **more),
        "landscape": lambda: sharpness.landscape(*given, points=arguments.points, **more),
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
    names = ["density", "eigenvalues", "landscape", "line"]
    pictures = [f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")]
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


def kept_run(folder, method, seed=0, epochs=(1, 3), **changes):
    """A run's folder with the networks of two epochs: the last layer is the larger, the later."""
    config = resolve_config(
        compose_config("demo", ["scale=smoke", f"method={method}", f"seed={seed}", "device=cpu"])
    )
    about = describe_run(config) | changes
    network = make_task(config, Workers("cpu"), about).network
    (folder / "networks").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about))
    for epoch in epochs:
        torch.save(network.state_dict(), folder / "networks" / f"epoch-{epoch:04}.pt")
        with torch.no_grad():
            list(network.parameters())[-2].mul_(1.5)
    torch.save(network.state_dict(), folder / "network.pt")
    return folder


def test_the_largest_eigenvalue_over_the_epochs(tmp_path, capsys):
    runs = [
        kept_run(tmp_path / "sgdm", "sgdm"),
        kept_run(tmp_path / "sam0", "sam", 0, (1, 2, 3)),
        kept_run(tmp_path / "sam1", "sam", 1),
    ]
    words = ["--over-epochs", "--batches", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["sharpness", *map(str, runs), *words]) == 0
    assert "SAM, seed 1:\n  epoch 1: largest eigenvalue" in capsys.readouterr().out
    pictures = [f"eigenvalues_over_epochs.{kind}" for kind in ("json", "pdf", "png", "svg")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == pictures
    content = json.loads((tmp_path / "out" / pictures[0]).read_text())
    courses = [Course(**run) for run in content["runs"]]
    assert [course.folder for course in courses] == [str(folder) for folder in runs]
    # Against the networks one by one.
    _, task = load_trained(runs[2], device="cpu")
    forward, batches = training_data(task, 2)
    for epoch, value, error in zip((1, 3), courses[2].values, courses[2].errors, strict=True):
        path = runs[2] / "networks" / f"epoch-{epoch:04}.pt"
        task.network.load_state_dict(torch.load(path, weights_only=True))
        found = sharpness.eigenvalues(forward, task.network, batches=batches)
        assert value == pytest.approx(float(found.values[0]), rel=1e-3)
        assert error == pytest.approx(float(found.standard_errors[0]), rel=0.05)
    sgdm, sam = lines_of(courses)
    assert (sgdm.label, sgdm.x, sgdm.std) == ("SGDM", [1, 3], None)
    a, b = courses[1].values[::2], courses[2].values  # epoch 2 is of one run only
    pairs = list(zip(a, b, strict=True))
    assert sam.x == [1, 3] and sam.y == pytest.approx([(x + y) / 2 for x, y in pairs])
    assert sam.std == pytest.approx([abs(x - y) / 2**0.5 for x, y in pairs])


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    first = kept_run(tmp_path / "a", "sgdm")

    def refused(*folders, over=True):
        words = ["--over-epochs"] if over else []
        assert main(["sharpness", *map(str, folders), *words, "--batches", "1"]) == 2
        return capsys.readouterr().err

    assert "several are compared with --over-epochs" in refused(first, first, over=False)
    (tmp_path / "none").mkdir()
    assert "run it with keep_every=N" in refused(tmp_path / "none")
    about = json.loads((first / "config.json").read_text())
    course = Course(about, first, [1, 3], [2.0, 3.0], [None, None], 1)
    noisy, seeded, set_otherwise = {"method": "SAM", "noise": 0.2}, {"seed": 1}, {"settings": {}}
    for changed, epochs, message in (
        (noisy, [1, 3], "another noise than .*/a;"),
        (set_otherwise, [1, 3], "another settings than .*/a;"),
        (seeded, [7, 8], "kept no epoch in common"),
    ):
        other = replace(course, about=about | changed, epochs=epochs)
        with pytest.raises(ValueError, match=message):
            refuse_unequal([course, other])
    refuse_unequal([course, replace(course, about=about | seeded)])
