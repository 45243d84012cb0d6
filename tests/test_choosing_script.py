"""benchmarks/choosing.py: the page of how to choose shows the tables of its numbers."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def choosing(monkeypatch):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import choosing

    yield choosing
    for name in ("choosing", "ablation"):
        sys.modules.pop(name)


def test_the_page_shows_the_tables_of_its_numbers(choosing):
    page = choosing.PAGE.read_text()
    data = json.loads(choosing.RESULTS.read_text())
    assert page.split(choosing.BEGIN)[1].split(choosing.END)[0].strip() == choosing.section(data)
    for problem in data["problems"].values():
        assert set(problem["methods"]) <= set(choosing.METHODS)
