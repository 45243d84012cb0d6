"""What a notebook shows of reports, summaries and optimizers: well-formed, escaped, complete."""

import copy
import pickle
from html.parser import HTMLParser

import pytest
import torch

import llqr
from tiny import mlp, optimizer_of, train


class Shown(HTMLParser):
    """The text of a fragment; a tag that is not closed in its place is an error."""

    def __init__(self, fragment):
        super().__init__()
        self.open, self.cells, self.rows = [], [], 0
        self.feed(fragment)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


@pytest.fixture
def trained():
    problem = mlp()
    geometry = llqr.NaturalGradient("kfac", every=2)
    optimizer = optimizer_of(problem, geometry=geometry, perturbation=llqr.SAM(0.07))
    train(optimizer, problem, 3)
    return optimizer


def test_a_report(trained):
    report = trained.last_report
    shown = Shown(report._repr_html_())
    assert shown.cells[0] == "refresh at step 2 accepted"
    # The same numbers and sentences as in print(report).
    headline, words = str(report).split("\n")
    numbers = shown.cells[1 : 1 + 2 * shown.rows]
    assert shown.rows == headline.count(",") + 1 and f"{report.change:.3g}" in numbers
    for name, text in zip(numbers[::2], numbers[1::2], strict=True):
        assert f"{name} {text}" in headline or f"{text} {name.replace('seconds', 's')}" in headline
    assert " ".join(shown.cells[1 + 2 * shown.rows :]) == words


def test_what_is_shown_is_escaped():
    report = llqr.RefreshReport(step=0, accepted=False, reason="<b>J</b> & co")
    html = report._repr_html_()
    assert "&lt;b&gt;J&lt;/b&gt; &amp; co" in html
    assert Shown(html).cells[0] == "refresh at step 0 refused (<b>J</b> & co)"


@pytest.mark.parametrize(
    "geometry", [llqr.NaturalGradient("kfac"), llqr.FixedGeometry({"0.bias": torch.tensor(2.0)})]
)
def test_a_summary_is_text_and_a_table(geometry):
    problem = mlp()
    optimizer_of(problem, geometry=geometry)
    summary = geometry.summary()
    lines, shown = summary.splitlines(), Shown(summary._repr_html_())
    assert isinstance(summary, str) and shown.rows == len(lines) - 1 == 5
    assert " ".join(shown.cells).split() == summary.split() and shown.cells[-1] == lines[-1]
    for copied in (copy.deepcopy(summary), pickle.loads(pickle.dumps(summary))):
        assert copied == summary and copied._repr_html_() == summary._repr_html_()


def test_an_optimizer(trained):
    shown = dict(zip(*[iter(Shown(trained._repr_html_()).cells[1:])] * 2, strict=True))
    assert shown["geometry"] == "NaturalGradient('kfac', every=2)"
    assert shown["perturbation"] == repr(trained.perturbation)
    assert {"SGD (", f"lr: {trained.base.param_groups[0]['lr']}"} < {
        line.strip() for line in shown["base"].splitlines()
    }
    assert "None" not in shown["base"] and shown["steps"] == "3 (0 skipped)"
    assert shown["last refresh"] == trained.last_report.headline()
    plain = Shown(optimizer_of(mlp())._repr_html_()).cells
    assert plain[plain.index("geometry") + 1] == "None" and plain[-1] == "none yet"
