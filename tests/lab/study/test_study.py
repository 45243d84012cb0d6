"""``llqr study``, from the command line to its files and its page."""

import json
import sys
from pathlib import Path

import pytest
import torch

from llqr_lab.cli import main
from llqr_lab.data.tokens import EOS, PAD
from llqr_lab.study import translation
from llqr_lab.study.bases import BASES
from llqr_lab.study.data import Examples
from llqr_lab.study.methods import METHODS, Method
from llqr_lab.study.page import in_short, marks, section
from llqr_lab.study.plan import STUDIES
from llqr_lab.study.problems import PROBLEMS
from llqr_lab.study.training import Device, Run, Training, train

ROOT = Path(__file__).parents[3]
CPU = Device()


def run_of(method="SGDM", steps=4, part="test", **settings):
    return Run("cnn", method, {"lr": 0.1, "rho": 0.05} | settings, 0, steps, part)


@pytest.mark.parametrize(
    ("page", "marked", "study", "shown"),
    [
        *(("docs/study.md", study, study, section) for study in STUDIES),
        ("README.md", "proof, in short", "proof", in_short),
    ],
)
def test_the_pages_equal_the_results(page, marked, study, shown):
    kept = json.loads((ROOT / "benchmarks" / "results" / "study.json").read_text())
    begin, end = marks(marked)
    text = (ROOT / page).read_text()
    assert text.split(begin)[1].split(end)[0].strip() == shown(kept.get(study))


def test_smoke_runs_resumes_and_collects(tmp_path, capsys):
    command = ["study", "proof", "--scale", "smoke", "--workers", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    results = json.loads((tmp_path / "proof-smoke.json").read_text())
    assert list(results["problems"]) == ["cnn-noise", "characters"]
    for name, problem in results["problems"].items():
        assert (tmp_path / f"study-proof-{name}.svg").exists()
        for method, row in problem["methods"].items():
            assert len(row["tuned"]["trials"]) == 2
            for reading, runs in row["runs"].items():
                assert [run["seed"] for run in runs] == [0, 1]
                for run in runs:
                    assert run["ended"] == "finished", (method, run)
                    assert run["curve"][-1][0] == row["lengths"][reading]
        assert problem["methods"]["SAM"]["lengths"] == {"steps": 4, "seconds": 4}
    assert "of 48 runs" in capsys.readouterr().out
    # One file is lost, a method is added: the rest stays.
    files = {p: p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*/*/runs/*.json"))}
    lost = next(iter(files))
    lost.unlink()
    assert main([*command, "--methods", "SGDM;SAM;MSAM", "--problems", "cnn-noise"]) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in files.items() if p != lost)
    assert lost.exists() or len(list(tmp_path.rglob("*/*/runs/*.json"))) > len(files) - 1


def test_a_search_of_the_weight_decay(tmp_path):
    command = ["study", "proof", "--scale", "smoke", "--workers", "1", "--out", str(tmp_path)]
    methods = "SGDM;SAM;AdamW;NG on AdamW"
    assert main([*command, "--problems", "cnn-long-decay", "--methods", methods]) == 0
    results = json.loads((tmp_path / "proof-smoke.json").read_text())
    for method, row in results["problems"]["cnn-long-decay"]["methods"].items():
        tried = [trial["settings"]["decay"] for trial in row["tuned"]["trials"]]
        assert len(tried) == 4 and len(set(tried)) > 1, method
        assert tried[0] == (0.1 if "AdamW" in method else 0.002)
    shown = section(results)
    assert "| lr | rho | decay |" in shown and "tried 4 settings here" in shown


@pytest.mark.parametrize("name", BASES)
def test_a_weight_decay_reaches_all_groups(name):
    base = BASES[name]
    if base.missing:
        pytest.skip(f"{name} needs {base.missing}")
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Conv2d(1, 2, 3))
    for decay in (base.decay, 0.03):
        settings = {"lr": 0.1} | ({} if decay == base.decay else {"decay": decay})
        optimizer = Method(base=name).optimizer(network, settings)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {decay}


def test_what_is_wrong_is_said(tmp_path, capsys, monkeypatch):
    command = ["study", "proof", "--scale", "smoke", "--out", str(tmp_path)]
    assert main([*command, "--methods", "Adagrad"]) == 2
    assert "got 'Adagrad'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setattr("llqr_lab.study.bases.find_spec", lambda name: None)
    assert main([*command, "--methods", "SOAP"]) == 2
    assert "llqr[peers]" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--page"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_the_gpu_study_runs_on_the_processor(tmp_path):
    command = ["study", "gpu", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*command, "--workers", "1", "--methods", "SGDM;SAM;NG + SAM along g"]) == 0
    results = json.loads((tmp_path / "gpu-smoke.json").read_text())
    methods = results["problems"]["resnet-wide"]["methods"]
    assert {run["ended"] for m in methods.values() for run in m["runs"]["steps"]} == {"finished"}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_trains_the_same_for_all_methods(name):
    problem = PROBLEMS[name]
    size = problem.sizes["smoke"]
    settings = {"lr": 0.01, "rho": 0.05}
    first, second, other = (
        Training(problem, size, METHODS[method], settings, seed, 2, CPU)
        for method, seed in (("SGDM", 0), ("AdamW", 0), ("SGDM", 1))
    )
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.data.train.inputs, other.data.train.inputs)
    assert torch.equal(first.data.test.inputs, other.data.test.inputs)
    batches = [t._next_batch() for t in (first, second)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    first.step()
    second.step()
    loss, metric = first.look("test")
    assert 0 < loss < 1000 and 0 <= metric < 1000


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].base == "schedule-free AdamW"])
def test_a_base_that_averages_shows_its_average(name):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    problem = PROBLEMS["cnn"]
    training = Training(problem, problem.sizes["smoke"], METHODS[name], {"lr": 0.01}, 0, 4, CPU)
    for _ in range(3):
        training.step()
    weight = training.network[0].weight.detach().clone()
    shown = training._shown_network()[0].weight
    assert torch.equal(training.network[0].weight, weight) and not torch.equal(shown, weight)


def test_a_run_that_diverges_or_fails_counts_as_untrained(monkeypatch):
    problem = PROBLEMS["cnn"]
    size = problem.sizes["smoke"]
    found = train(run_of(lr=1e30), problem, size, METHODS["SGDM"], CPU)
    assert found["ended"] == "diverged" and found["metric"] == found["curve"][0][2]
    monkeypatch.setattr(Training, "step", lambda self: 1 / 0)
    found = train(run_of(), problem, size, METHODS["SGDM"], CPU)
    assert found["ended"] == "failed" and "ZeroDivisionError" in found["error"]
    assert found["metric"] == found["curve"][0][2]

    def broken(lr):
        raise ValueError("no optimizer")

    monkeypatch.setattr(Method, "optimizer", lambda *_: broken(0))
    assert train(run_of(), problem, size, METHODS["SGDM"], CPU)["metric"] is None


def test_wrong_labels_are_of_training_only():
    problem = PROBLEMS["cnn-noise"]
    size = problem.sizes["smoke"]
    noisy, clean = (PROBLEMS[n].data(size, 0, torch.device("cpu")) for n in ("cnn-noise", "cnn"))
    assert isinstance(noisy.train, Examples)
    wrong = (noisy.train.targets != clean.train.targets).double().mean()
    assert float(wrong) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(noisy.test.targets, clean.test.targets)
    assert torch.equal(noisy.validation.targets, clean.validation.targets)


def test_sentences_are_short_and_padding_counts_nowhere(monkeypatch):
    """A naive computation: pair by pair, without padding."""
    problem = PROBLEMS["translation"]
    size = problem.sizes["smoke"]
    network = problem.network(size, 0).double()
    few = problem.data(size, 0, torch.device("cpu")).train.at(slice(5))
    assert few.inputs.shape == (5, 2, size.extent) and (few.targets == PAD).any()
    with torch.no_grad():
        loss = problem.kind.loss(network(few.inputs), few.targets)
        logs, count = 0.0, 0
        for (source, prefix), target in zip(few.inputs, few.targets, strict=True):
            n = int((target != PAD).sum())
            assert target[n - 1] == EOS and prefix[0] == EOS
            assert torch.equal(prefix[1:n], target[: n - 1])
            logits = network.translator(source[None, source != PAD], prefix[None, :n])[0]
            logs += float(logits.log_softmax(1)[range(n), target[:n]].sum())
            count += n
    assert float(loss) == pytest.approx(-logs / count, rel=1e-12)
    # Who translates as the text does has 100, who repeats one sentence has not.
    right = [row[: int((row != PAD).sum()) - 1].tolist() for row in few.targets]
    monkeypatch.setattr(translation, "beam_search", lambda *_, **__: right)
    assert problem.bleu(size, network, few) == pytest.approx(100)
    monkeypatch.setattr(translation, "beam_search", lambda *_, **__: right[:1] * 5)
    assert problem.bleu(size, network, few) < 90
