"""Like with like: what differs in more than method and seed is not compared, averaged or fitted."""

import json
import re

import pytest

from lab.collect.made_up import run, timing
from llqr_lab.collect.cadence import fill_cadence
from llqr_lab.collect.likeness import differences_between
from llqr_lab.collect.runs import RunError, find_runs, read_result
from llqr_lab.collect.tables import fill_table
from llqr_lab.collect.timing import collect_figure6
from llqr_lab.common.statistics import mean_std

IWSLT = ("table6", "IWSLT14", "transformer-iwslt")
KNOWN = {"data": {"digest": "1234", "preparation": "raw text, joint BPE"}}
OTHER = {"data": {"digest": "5678", "preparation": "tokenised files, their words"}}


def two(tmp_path, one, other, where=IWSLT, methods=("SAM", "AdamW")):
    folders = [
        run(tmp_path, f"{i}", *where, method, 0, 30.0 + i, **dict(options))
        for i, (method, options) in enumerate(zip(methods, (one, other), strict=True))
    ]
    return [read_result(folder / "result.json") for folder in folders]


@pytest.mark.parametrize(
    "one, other, said",
    [
        ({}, {}, None),
        (KNOWN, KNOWN, None),
        (KNOWN, OTHER, "data: IWSLT14 .raw text, joint BPE, 1234. or IWSLT14 .tokenised files"),
        (KNOWN, {}, "data: .*data unknown, unknown"),
        ({}, {"source": "number-words"}, "data: .* or number-words"),
        ({"changes": {"train.tokens": 8192}}, {}, "train.tokens: 8192 or 4096"),
        ({"changes": {"base.lr": 1.0}}, {}, "base.lr: 1.0 or 0.0005"),
        ({"changes": {"train.clip_norm": 1.0}}, {}, "train.clip_norm: 1.0 or null"),
        ({"changes": {"probe.rho": 1.0}}, {}, None),  # the baseline has none
        ({"changes": {"base.lr": 1.0}}, {"changes": {"base.lr": 1.0}}, None),
        ({"processes": 4}, {}, None),
    ],
)
def test_runs_are_alike_apart_from_method_and_seed(tmp_path, one, other, said):
    runs = two(tmp_path, one, other)
    found = differences_between(*runs)
    assert bool(found) == (said is not None)
    assert said is None or re.search(said, found[0])
    # A table takes the difference accordingly, and says why not.
    table = fill_table("6", find_runs(tmp_path))
    cell = next(c for c in table.rows[0]["cells"] if c["method"] == "SAM")
    assert (cell["minus"] is None) == bool(found)
    notes = [n for n in table.notes if "no difference to AdamW is taken" in n]
    assert len(notes) == bool(found)
    assert not found or found[0] in notes[0]


def test_what_the_protocol_gives_a_method_of_its_own_may_differ(tmp_path):
    where = ("fashion", "Fashion-MNIST", "vgg16-bn")
    sam, sgdm = two(tmp_path, {}, {}, where, ("SAM", "SGDM"))
    assert sam["settings"]["base.lr"] != sgdm["settings"]["base.lr"]  # each was tuned
    assert differences_between(sam, sgdm) == []
    changed, _ = two(tmp_path / "x", {"changes": {"base.lr": 9.0}}, {}, where, ("SAM", "SGDM"))
    assert differences_between(changed, sgdm) == [f"base.lr: 9.0 or {sgdm['settings']['base.lr']}"]
    # Two structures of U are not the same method.
    where = ("table7", "CIFAR-100", "resnet18")
    pair = ("LLQR+SAM (NGD)", "LLQR^Delta+SAM")
    one, other = two(tmp_path / "y", {"changes": {"llqr.structure": "diagonal"}}, {}, where, pair)
    assert differences_between(one, other) == ['llqr.structure: "diagonal" or "e-kfac"']


def test_a_mean_takes_runs_of_equal_data(tmp_path):
    where = (*IWSLT, "SAM")
    run(tmp_path, "0", *where, 0, 30.0, **KNOWN)
    run(tmp_path, "1", *where, 1, 32.0, **KNOWN)
    assert fill_table("6", find_runs(tmp_path)).rows[0]["cells"][2]["mean"] == 31.0
    run(tmp_path, "2", *where, 2, 99.0, **OTHER)
    run(tmp_path, "3", *where, 3, 99.0)
    with pytest.raises(RunError, match='data.digest: "1234" or "5678" or "unknown".*--where'):
        fill_table("6", find_runs(tmp_path))
    for digest, mean in (("1234", 31.0), ("5678", 99.0), ("unknown", 99.0)):
        table = fill_table("6", find_runs(tmp_path, [f'data.digest="{digest}"']))
        assert table.rows[0]["cells"][2]["mean"] == mean
        assert any("did not record their data" in n for n in table.notes) == (digest == "unknown")


def test_the_literal_protocol_of_imagenet_stays_beside_the_usual_one(tmp_path):
    for recipe, best in (("table5", 77.0), ("table5-literal", 70.0)):
        run(tmp_path, recipe, recipe, "ImageNet", "resnet50", "SGDM", 0, best, **KNOWN)
    table = fill_table("5", find_runs(tmp_path))
    assert table.rows[0]["cells"][0]["mean"] == 77.0
    assert any(
        "runs of table5-literal have other settings and are not used" in n for n in table.notes
    )
    table = fill_table("5", find_runs(tmp_path, ["recipe=table5-literal"]))
    assert table.rows[0]["cells"][0]["mean"] == 70.0


def test_figure_6_fits_a_line_per_structure_of_equal_runs_only(tmp_path):
    sizes = {"vit-ti16": 10**6, "vit-s16": 10**7, "vit-b16": 10**8}
    for i, (model, parameters) in enumerate(sizes.items()):
        at = {"parameters": parameters, "recipe": "figure6"}
        timing(tmp_path, f"e{i}", model, "LLQR (NGD)", 500, 9.0, 10.0**i, **at)
        folder = timing(tmp_path, f"d{i}", model, "LLQR (NGD)", 500, 9.0, 10.0 ** (2 * i), **at)
        changed(folder, {"llqr.structure": "diagonal"})
    figure = collect_figure6(find_runs(tmp_path))
    fits = {name: round(fit["exponent"], 6) for name, fit in figure.facts["fits"].items()}
    assert fits == {"LLQR (NGD), diagonal": 2.0, "LLQR (NGD), e-kfac": 1.0}
    assert len(figure.rows) == 6 and figure.paint() is not None
    # Another batch is not the same measurement.
    changed(tmp_path / "e2", {"train.batch": 64})
    figure = collect_figure6(find_runs(tmp_path))
    assert list(figure.facts["fits"]) == ["LLQR (NGD), diagonal"]
    assert any("e-kfac: no line is fitted" in n and "train.batch" in n for n in figure.notes)


def changed(folder, settings):
    path = folder / "result.json"
    content = json.loads(path.read_text())
    content["settings"] |= settings
    content["changed"] = sorted({*content["changed"], *settings})
    path.write_text(json.dumps(content))


def test_a_ratio_of_times_is_of_equal_runs(tmp_path):
    timing(tmp_path, "s", "vit-b16", "SGDM", None, 30.0)
    timing(tmp_path, "l", "vit-b16", "LLQR (NGD)", 500, 60.0, 3.0)
    row = fill_cadence(find_runs(tmp_path)).rows
    ratios = {c["ours"] for r in row for c in r["cells"] if c["quantity"] == "vs. SGD"}
    assert "2.00" in ratios
    changed(tmp_path / "l", {"train.precision": "float32"})
    table = fill_cadence(find_runs(tmp_path))
    ratios = {c["ours"] for r in table.rows for c in r["cells"] if c["quantity"] == "vs. SGD"}
    assert "2.00" not in ratios
    assert any("no difference to SGDM" in n and "train.precision" in n for n in table.notes)
    assert mean_std([1.0]) == (1.0, None)
