"""The documentation: its code runs, its table is measured, its API page is complete."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llqr

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def code_of(page):
    text = (DOCS / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in PAGES if code_of(page)]


def test_the_pages_with_code():
    assert WITH_CODE == ["how-to-choose.md", "index.md", "method.md"]


@pytest.mark.filterwarnings("ignore:a refresh was refused:UserWarning")
@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs_in_order(page, capsys):
    with torch.random.fork_rng():
        exec(compile("\n".join(code_of(page)), page, "exec"), {"__name__": "page"})


def test_the_api_page_has_every_public_name():
    public = {
        name
        for name, value in vars(llqr).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    documented = re.findall(r"^::: llqr\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(public)


def test_docs_and_readme_never_name_a_setting_that_is_gone():
    text = "".join((DOCS / page).read_text() for page in PAGES) + (ROOT / "README.md").read_text()
    calls = re.findall(r"llqr\.(LLQR|SAM|ASAM|FisherSAM|FriendlySAM|Optimizer)\(([^()]*)\)", text)
    assert len(calls) > 10
    for name, arguments in calls:
        known = inspect.signature(getattr(llqr, name)).parameters
        for argument in re.findall(r"(\w+)=", arguments):
            assert argument in known, f"{name}({argument}=...)"


CELL = re.compile(r"^([\d.e+-]+) \(([\d.]+)\)$")


def cells(table):
    rows = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_of_inner_learning_rates_is_what_its_script_prints():
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "inner_learning_rate.py")]
    # One thread: so small a network only loses by more, most of all on a busy machine.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    text = (DOCS / "how-to-choose.md").read_text()
    table = re.search(r"^\| structure \| lr 0\.001 .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    shown, printed = cells(table[0]), cells(done.stdout)
    assert [row[0] for row in shown] == [row[0] for row in printed]
    assert shown[0] == printed[0]
    for ours, theirs in zip(shown[2:], printed[2:], strict=True):
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            if CELL.match(b) is None:
                assert a == b == "refused"
                continue
            (change, cosine), expected = CELL.match(a).groups(), CELL.match(b).groups()
            assert float(change) == pytest.approx(float(expected[0]), rel=0.06)
            assert float(cosine) == pytest.approx(float(expected[1]), abs=0.011)
