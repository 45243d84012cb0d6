"""Collected figures: means and bands, the fit's exponent, and the files."""

import csv
import json
import statistics

import matplotlib
import pytest

from lab.collect.made_up import run, timing
from llqr_lab.cli import main
from llqr_lab.collect.curves import collect_figure1, collect_figure4
from llqr_lab.collect.runs import find_runs
from llqr_lab.collect.timing import collect_figure5, collect_figure6, power_law
from llqr_lab.common.drawing import COLOURS, spread_places
from llqr_lab.protocols import METHODS

matplotlib.use("Agg")
SIZES = {"vit-ti16": 5.7e6, "vit-s16": 22e6, "vit-b16": 86e6, "vit-l16": 304e6}


def curves(root, recipe, dataset, model, methods, seeds=(0, 1, 2)):
    for i, method in enumerate(methods):
        for seed in seeds:
            run(
                root,
                f"{recipe}/{method}/{seed}",
                recipe,
                dataset,
                model,
                method,
                seed,
                30.0 + i + seed,
            )


def time_axis(figure) -> str:
    """Return what the horizontal axis of the second panel is named."""
    picture = figure.paint()
    label = picture.axes[1].get_xlabel()
    matplotlib.pyplot.close(picture)
    return label


def test_figure_1_has_mean_error_and_its_deviation_by_epoch(tmp_path):
    methods = ("SGDM", "LLQR (NGD)", "F-SAM", "LLQR+F-SAM (NGD)")
    curves(tmp_path, "table5", "ImageNet", "resnet50", methods)
    figure = collect_figure1(find_runs(tmp_path))
    assert [r["epoch"] for r in figure.rows if r["method"] == "F-SAM"] == [1, 2, 3]
    second = next(r for r in figure.rows if (r["method"], r["epoch"]) == ("F-SAM", 2))
    errors = [100 - (32.0 + seed) for seed in (0, 1, 2)]
    assert second["error"] == pytest.approx(statistics.fmean(errors))
    assert second["error_std"] == pytest.approx(statistics.stdev(errors))
    assert second["test_loss"] == pytest.approx(0.8)
    assert (second["seconds"], second["elapsed_seconds"], second["seeds"]) == (10.0, 12.0, 3)
    assert figure.missing == [] and figure.caption().count("mean") == 1
    assert time_axis(figure) == "elapsed time with loading and evaluation (seconds)"
    # A run of an earlier version did not record it; what is drawn then is named.
    path = tmp_path / "table5" / "SGDM" / "1" / "result.json"
    content = json.loads(path.read_text())
    for epoch in content["epochs"]:
        del epoch["elapsed_seconds"]
    path.write_text(json.dumps(content))
    figure = collect_figure1(find_runs(tmp_path))
    assert time_axis(figure) == "time of steps and refreshes only (seconds)"


def test_figure_4_leaves_a_gap_where_a_seed_has_no_number(tmp_path):
    where = ("table6", "IWSLT14", "transformer-iwslt")
    curves(tmp_path, *where, ("SAM",))
    path = tmp_path / "table6" / "SAM" / "1" / "result.json"
    content = json.loads(path.read_text())
    content["epochs"][0]["bleu"] = None
    path.write_text(json.dumps(content))
    figure = collect_figure4(find_runs(tmp_path))
    first, second, _ = figure.rows
    assert first["bleu"] is None and first["token_error"] == 60.0
    assert second["bleu"] == pytest.approx(31.0)
    assert figure.missing == ["AdamW", "LLQR (NGD)", "LLQR+SAM (NGD)"]
    assert "Missing: AdamW" in figure.caption()
    figure.paint()


@pytest.mark.parametrize("collect, where", [
    (collect_figure1, ("table5", "ImageNet", "resnet50", "F-SAM", 0, 70.0)),
    (collect_figure4, ("table6", "IWSLT14", "transformer-iwslt", "SAM", 0, 30.0)),
])  # fmt: skip
def test_unlike_runs_are_not_drawn_together_without_a_note(collect, where, tmp_path):
    recipe, dataset, model, method, *_ = where
    base = {"table5": "SGDM", "table6": "AdamW"}[recipe]
    run(tmp_path, "base", recipe, dataset, model, base, 0, 30.0)
    run(tmp_path, "like", *where)
    assert "UNLIKE" not in collect(find_runs(tmp_path)).caption()
    run(tmp_path, "unlike", *where[:3], f"LLQR+{method} (NGD)", 0, 1.0, changes={"train.epochs": 3})
    said = collect(find_runs(tmp_path)).caption()
    assert f"UNLIKE RUNS: {base} and LLQR+{method} (NGD) differ in train.epochs: " in said


@pytest.mark.parametrize("exponent", [1.0, 1.275, 2.0])
def test_the_fit_finds_the_exponent_of_a_power_law(exponent, tmp_path):
    for model, size in SIZES.items():
        for method, factor in (("LLQR (NGD)", 1.0), ("LLQR+SAM (NGD)", 1.5)):
            seconds = factor * 3e-9 * size**exponent
            options = {"parameters": int(size), "recipe": "figure6"}
            timing(tmp_path, f"{model}-{method}", model, method, 500, 9.0, seconds, **options)
    figure = collect_figure6(find_runs(tmp_path))
    for method, factor in (("LLQR (NGD)", 1.0), ("LLQR+SAM (NGD)", 1.5)):
        fit = figure.facts["fits"][method]
        assert fit["exponent"] == pytest.approx(exponent, rel=1e-12)
        assert fit["c"] == pytest.approx(factor * 3e-9, rel=1e-9)
        assert fit["points"] == 4
    assert figure.facts["paper_exponents"] == [1.27, 1.28] and figure.missing == []


def test_the_fit_is_least_squares_of_logarithms():
    import numpy

    x, y = [1.0, 2.0, 5.0, 30.0], [2.0, 1.0, 9.0, 20.0]
    slope, intercept = numpy.polyfit(numpy.log(x), numpy.log(y), 1)
    c, a = power_law(x, y)
    assert (a, c) == (pytest.approx(slope), pytest.approx(numpy.exp(intercept)))


def test_figure_6_takes_the_interval_that_most_networks_have(tmp_path):
    for i, (model, every) in enumerate(
        [("vit-ti16", 500), ("vit-b16", 500), ("vit-b16", 50), ("vit-b16", 100)]
    ):
        at = (model, "LLQR (NGD)", every, 9.0, 1.0 + i)
        recipe = "figure6" if model == "vit-ti16" else "table10"
        timing(tmp_path, str(i), *at, parameters=int(SIZES[model]), recipe=recipe)
    timing(tmp_path, "x", "vit-l16", "LLQR (NGD)", 500, 9.0, None)
    figure = collect_figure6(find_runs(tmp_path))
    assert figure.facts["every"] == 500
    assert [(r["model"], r["update_seconds"]) for r in figure.rows] == [
        ("vit-b16", 2.0),
        ("vit-ti16", 1.0),
    ]
    assert any("vit-l16" in n and "no refresh after the first was timed" in n for n in figure.notes)


def test_figure_5_has_a_row_an_interval_and_one_a_baseline(tmp_path):
    for every in (50, 100):
        timing(tmp_path, f"{every}", "vit-b16", "LLQR (NGD)", every, 1000 / every)
    timing(tmp_path, "s", "vit-b16", "SAM", None, 5.0)
    figure = collect_figure5(find_runs(tmp_path))
    assert [(r["method"], r["every"], r["epoch_seconds"]) for r in figure.rows] == [
        ("SAM", None, 5.0),
        ("LLQR (NGD)", 50, 20.0),
        ("LLQR (NGD)", 100, 10.0),
    ]
    assert "ViT-L/16 SGDM" in figure.missing and "ViT-B/16 SAM" not in figure.missing


@pytest.mark.parametrize("number", ["1", "4", "5", "6"])
@pytest.mark.parametrize("several", [True, False], ids=["several seeds", "one"])
def test_the_command_draws_and_writes(number, several, tmp_path, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    seeds = (0, 1) if several else (0,)
    if number == "1":
        curves(runs, "table5", "ImageNet", "resnet50", ("SGDM", "F-SAM"), seeds)
    elif number == "4":
        curves(runs, "table6", "IWSLT14", "transformer-iwslt", ("SAM", "AdamW"), seeds)
    for i, model in enumerate(("vit-b16", "vit-l16")[: 1 + several] if number in "56" else ()):
        timing(runs, f"{i}", model, "LLQR (NGD)", 500, 9.0, 2.0 + i, parameters=10 ** (6 + i))
        timing(runs, f"{i}-0", model, "SAM", None, 4.0)
    assert main(["figure", number, "--runs", str(runs), "--out", str(out), "--scale", "paper"]) == 0
    said = capsys.readouterr().out
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        content = (out / f"figure{number}.{suffix}").read_bytes()
        assert content.startswith(start) and len(content) > 4_000
    content = json.loads((out / f"figure{number}.json").read_text())
    assert content["scale"] == "paper" and content["rows"] and content["missing"]
    with (out / f"figure{number}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(content["rows"])
    assert f"wrote {out / f'figure{number}.png'}" in said and "Missing: " in said


def test_without_runs_the_command_is_said(tmp_path, capsys):
    assert main(["figure", "1", "--out", str(tmp_path)]) == 1
    assert "llqr run table5 model=resnet50 method=" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_labels_are_spread_in_order():
    found = spread_places({"a": 0.9, "b": 0.1, "c": 0.11, "d": 0.12}, 0.05)
    assert found["a"] == 0.9
    assert [found[k] for k in "bcd"] == pytest.approx([0.06, 0.11, 0.16])
    assert spread_places({}, 0.1) == {}


def test_every_method_has_a_colour():
    own = {"NG", "NG+SAM", "NG+SAM/5", "GM", "GM+SAM/5"}  # which no figure of the paper has
    assert set(COLOURS) == set(METHODS) - own
