"""The report: well-formed, self-contained, and says what has to be said."""

import re
from html.parser import HTMLParser

import pytest

from lab.collect.made_up import refresh, run, timing
from llqr_lab.cli import main
from llqr_lab.collect.run_curves import panels_of
from llqr_lab.collect.runs import find_runs

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects texts and attributes; refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def made(tmp_path, *options):
    out = tmp_path / "out"
    assert main(["report", "--runs", str(tmp_path / "runs"), "--out", str(out), *options]) == 0
    assert [path.name for path in out.iterdir()] == ["report.html"]
    source = (out / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    return source, page


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    at = ("table1", "CIFAR-10", "resnet18")
    for seed in (0, 1):
        run(root, f"a{seed}", *at, "SAM", seed, 96.0 + seed)
        run(root, f"b{seed}", *at, "LLQR+SAM (NGD)", seed, 96.5 + seed)
        run(root, f"c{seed}", *at, "LLQR (Newton)", seed, 95.0, change=0.05)
    run(root, "d", *at, "SGDM", 0, 94.0, changes={"base.lr": 0.123})
    for seed in (0, 1):
        run(root, f"e{seed}", "table5", "ImageNet", "resnet50", "F-SAM", seed, 77.0)
    for i, model in enumerate(("vit-b16", "vit-l16")):
        at = (model, "LLQR (NGD)", 500, 9.0, 10.0**i)
        timing(root, f"t{i}", *at, parameters=10 ** (6 + i))
    (root / "going").mkdir()
    (root / "going" / "metrics.jsonl").write_text("")
    return tmp_path


def test_the_report_is_one_well_formed_file_without_anything_external(runs):
    source, page = made(runs)
    assert "script" not in page.tags and "link" not in page.tags
    loaded = [value for _, name, value in page.attributes if name in ("src", "srcset")]
    assert len(loaded) == 3 and all(v.startswith("data:image/png;base64,") for v in loaded)
    linked = [value for _, name, value in page.attributes if name == "href"]
    names = [f"#{value}" for _, name, value in page.attributes if name == "id"]
    assert linked == names and len(set(names)) == len(names) == 1 + 4 + 3 + 4
    assert not re.search(r"https?://|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source


def test_the_report_shows_tables_figures_and_what_is_missing(runs):
    _, page = made(runs)
    text = "\n".join(page.texts)
    for part in (
        "Table 1: CIFAR-10 standard",
        "Table 4: CIFARs",  # SAM and LLQR+SAM are table 1's runs
        "Table 5: ImageNet",
        "Table 10: Measured",
        "Figure 1: ImageNet",
        "Figure 5: Epoch time",
        "Figure 6: Refresh time",
        "96.50 ± 0.71 (2)",
        "paper 96.65 ± 0.16",
        "95.50 ± 0.71",  # after the last epoch
        "minus SAM: +0.50 [+0.50, +0.50] (2)",
        "llqr run table1 model=vgg16-bn method=sgdm seed=0",
        "LLQR (NGD): exponent 1.00 of 2 networks; the paper has 1.27 and 1.28.",
    ):
        assert part in text, part
    for number in (2, 3, 6, 7, 8):
        assert f"Table {number}:" not in text
    missing = [t for t in page.texts if t == "missing"]
    # Of table 10's 150 cells 12 mean nothing, and two rows have updates, epoch and steady update.
    assert len(missing) == (28 - 4) + (32 - 2) + (6 - 1) + (150 - 12 - 6)


def test_the_report_says_what_the_runs_are(runs):
    _, page = made(runs)
    text = "\n".join(page.texts)
    assert "1 unfinished runs, not used" in text and str(runs / "runs" / "going") in text
    assert "INACTIVE (below 0.1)" in text and "4 of 4" in text and "acts" in text
    assert "made up" in text and "2.13.0" in text  # the machine, the version
    assert "table1, CIFAR-10, resnet18, SGDM" in text and "0.123" in text
    assert "base.weight_decay" in text and "the paper gives only the grid and the rule" in text
    assert "do not compare" not in text


def test_warnings_stand_in_one_place_and_once(runs):
    source, _ = made(runs)
    start, end = source.index('id="warnings"'), source.index('id="table-1')
    assert source.count("Seeds per cell:") == source[start:end].count("Seeds per cell:") > 0
    assert "CIFAR-10, resnet18, LLQR (Newton): U is inactive" in source[start:end]
    assert "unfinished runs" in source[start:end] and "* settings were changed" in source[start:end]


def test_each_run_has_its_curves(tmp_path):
    reports = [refresh(0), refresh(10, change=0.05, accepted=False), refresh(20, change=None)]
    where = ("table1", "CIFAR-10", "resnet18", "LLQR (NGD)", 0, 95.0)
    run(tmp_path / "runs", "a", *where, refreshes=reports)
    (found,) = find_runs(tmp_path / "runs").runs
    loss, accuracy, change, eigenvalues = panels_of(found)
    # losses 2, 1.5, 1; accuracies 93, 95, 94
    assert loss["lines"] == [[(0, 0), (100, 45), (200, 90)]]
    assert accuracy["lines"] == [[(0, 90), (100, 0), (200, 45)]]
    assert (loss["low"], loss["high"], loss["left"], loss["right"]) == (1.0, 2.0, 1, 3)
    assert change["lines"] == [[(0, 0), (200, 90)]] and change["note"] == "1 of 3 refused"
    assert change["level"] == pytest.approx(90 * (1 - 0.05 / 0.45))
    assert len(eigenvalues["lines"]) == 2 and eigenvalues["level"] == pytest.approx(45)
    source, page = made(tmp_path)
    assert page.tags.count("svg") == 4 and "seed 0" in page.texts


def test_refused_refreshes_and_skipped_steps_are_counted(tmp_path):
    reports = [refresh(0), refresh(500, accepted=False), refresh(1000, change=None)]
    where = ("table1", "CIFAR-10", "resnet18", "LLQR (NGD)", 0, 95.0)
    run(tmp_path / "runs", "a", *where, refreshes=reports, skipped_steps=3)
    _, page = made(tmp_path)
    folder = tmp_path / "runs" / "a"
    assert f"3 steps without finite gradients were skipped: {folder}" in page.texts
    assert "2 of 3" in page.texts and "acts" in page.texts


def test_a_small_report_warns(runs):
    where = ("table1", "CIFAR-10", "resnet18", "SAM", 0, 50.0)
    run(runs / "runs", "small", *where, scale="small", source="digits")
    _, page = made(runs, "--scale", "small")
    text = "\n".join(page.texts)
    assert "Scale small: digits in place of CIFAR-10, smaller networks" in text
    assert "These numbers do not compare with the paper's." in text
    assert "NOT COMPARABLE" in text and "50.00 (1)" in text and "96.50" not in text


def test_experiments_of_other_names_have_a_table_of_their_own(tmp_path):
    root = tmp_path / "runs"
    for seed in (0, 1):
        for method, best in (("SGDM", 80.0), ("SAM", 82.0 + seed), ("LLQR+SAM (NGD)", 83.0)):
            folder = f"{method}-{seed}"
            where = ("CIFAR-10", "vgg16-bn", method, seed, best)
            run(root, folder, "table1", *where, noise=0.4, named="our-own")
    run(root, "small", "table1", "CIFAR-10", "resnet18", "SAM", 0, 50.0, scale="small")
    _, page = made(tmp_path)
    text = "\n".join(page.texts)
    assert "our-own" in page.texts and "CIFAR-10, noise 0.4" in page.texts
    assert "81.50 ± 0.71" in text and "82.50 ± 0.71" in text  # last and best epoch of SAM
    assert "SGDM: +2.50 [+2.00, +3.00] (2)" in page.texts
    assert "SAM: +0.50 [+0.00, +1.00] (2)" in page.texts
    assert "Scale small; 27 of 28 cells missing." in page.texts


def test_text_of_runs_is_escaped(tmp_path):
    where = ("table1", "CIFAR-10", "resnet18", "SAM", 0, 50.0)
    run(tmp_path / "runs", "a", *where, environment={"processor": "<b>&"})
    source, page = made(tmp_path)
    assert "&lt;b&gt;&amp;" in source and "<b>&" in page.texts


def test_without_runs_a_command_is_said(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert "llqr run table1 model=vgg16-bn method=" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("{")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "result.json") in capsys.readouterr().err
