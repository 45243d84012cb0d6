"""The documentation: its code runs, its table is measured, its API page is complete."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llqr
from integrations.small import forget_accelerator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def code_of(page):
    text = (DOCS / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in PAGES if code_of(page)]


def test_the_pages_with_code():
    assert WITH_CODE == [
        "coming-from.md",
        "extending.md",
        "frameworks.md",
        "how-to-choose.md",
        "index.md",
        "method.md",
        "sharpness.md",
        "troubleshooting.md",
    ]


NEEDS = {"frameworks.md": ("lightning", "accelerate", "transformers")}


@pytest.mark.filterwarnings("ignore:a refresh was refused:UserWarning")
@pytest.mark.filterwarnings("ignore:the forward's autocast is switched off:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's, as the next
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval")
@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs_in_order(page, capsys):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if "optim.Muon" in "".join(code_of(page)) and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    if page in NEEDS:
        forget_accelerator()
    with torch.random.fork_rng():
        exec(compile("\n".join(code_of(page)), page, "exec"), {"__name__": "page"})


def pages_checker():
    path = ROOT / ".ci" / "check_pages.py"
    spec = importlib.util.spec_from_file_location("check_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "line, fault",
    [
        ('<script src="https://cdn.example/a.js"></script>', "loaded from elsewhere"),
        ('<script src="//cdn.example/a.js"></script>', "loaded from elsewhere"),
        ('<link rel="stylesheet" href="http://x.example/a.css">', "loaded from elsewhere"),
        ('<img srcset="a.png 1x, https://x.example/b.png 2x">', "loaded from elsewhere"),
        ("<style>@font-face{src:url(https://x.example/f.woff2)}</style>", "loaded from elsewhere"),
        ("<style>@import 'https://x.example/a.css';</style>", "loaded from elsewhere"),
        ('<img src="missing.png">', "is not there"),
        ('<a href="https://x.example">a link</a><link rel="canonical" href="https://x">', None),
        ('<img src="a.png?v=1"><img src="data:image/png;base64,AA==">', None),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(tmp_path, line, fault):
    (tmp_path / "a.png").touch()
    (tmp_path / "page.html").write_text(f"<html><body>{line}</body></html>")
    found = list(pages_checker().faults(tmp_path))
    assert len(found) == (fault is not None) and all(text.endswith(fault) for text in found)


def test_formulas_are_typeset_by_files_of_these_pages():
    """The built pages are checked where they are built (.ci/run); here what they are made of."""
    config = (ROOT / "mkdocs.yml").read_text()
    assets = re.findall(r"^  - ((?:katex|javascripts|stylesheets)/\S+)$", config, re.MULTILINE)
    assert len(assets) == 4 and all((DOCS / asset).is_file() for asset in assets)
    assert "://" not in config and (DOCS / "katex" / "LICENSE").is_file()
    style = DOCS / "katex" / "katex.min.css"
    fonts = pages_checker().loaded_by(style)
    assert set(fonts) == {f"fonts/{p.name}" for p in (DOCS / "katex" / "fonts").iterdir()}


def texts_of_the_library():
    """Every string in the source, as one text each; what is formatted into it becomes a NUL."""
    for file in (ROOT / "src" / "llqr").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_messages_of_the_library():
    page = (DOCS / "troubleshooting.md").read_text()
    reasons = re.search(r"^\| reason .*?(?=\n\n)", page, re.MULTILINE | re.DOTALL)[0]
    quoted = re.findall(r"^```text\n(.*)\n```$", page, re.MULTILINE)
    quoted += re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", reasons, re.MULTILINE)))
    quoted += ["the gradients of this step differ between the ... processes"]
    assert len(quoted) > 15
    texts = list(texts_of_the_library())
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("...") if piece.strip(" ;")]
        assert any(all(piece in text for piece in pieces) for text in texts), message


def public_names(module):
    shown = [n for n in dir(module) if n[0] != "_"]
    return [n for n in shown if not inspect.ismodule(getattr(module, n))]


def test_the_api_page_has_every_public_name():
    page = (DOCS / "api.md").read_text()
    documented = re.findall(r"^::: llqr\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(public_names(llqr))
    shown = re.findall(r"^::: llqr\.sharpness\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(public_names(llqr.sharpness))


def test_docs_and_readme_never_name_a_setting_that_is_gone():
    text = "".join((DOCS / page).read_text() for page in PAGES) + (ROOT / "README.md").read_text()
    calls = re.findall(r"llqr\.(LLQR|NaturalGradient|\w*SAM|Optimizer)\(([^()]*)\)", text)
    assert len(calls) > 10
    for name, arguments in calls:
        known = inspect.signature(getattr(llqr, name)).parameters
        for argument in re.findall(r"(\w+)=", arguments):
            assert argument in known, f"{name}({argument}=...)"


# The method columns of the paper's tables; NGD is blue there, Newton orange.
BOTH = {"LLQR, NGD", "LLQR, Newton", "LLQR+SAM, NGD", "LLQR+SAM, Newton"}
DELTA = r"LLQR\(^\Delta\)+SAM"
TABLES = {
    1: {"SGDM", "SAM", "FisherSAM", *BOTH},
    2: {"SGDM", "SAM", "FisherSAM", *BOTH},
    3: {"SGDM", "SAM", *BOTH},
    4: {"SAM", "F-SAM", "LLQR+SAM, NGD", "LLQR+F-SAM, NGD"},
    5: {"SGDM", "LLQR, NGD", "LLQR, Newton", "F-SAM", "LLQR+F-SAM, NGD", "LLQR+F-SAM, Newton"},
    6: {"AdamW", "LLQR, NGD, on AdamW", "SAM on AdamW, after the warm-up",
        "LLQR+SAM, NGD, on AdamW"},
    7: {"FisherSAM", DELTA, "LLQR+SAM, NGD"},
    8: {"SGDM", "Adam", "LLQR, NGD", "SAM", "LLQR+SAM, NGD"},
}  # fmt: skip
METHODS = re.findall(
    r"^\| ([^|]+) \| ([\d, -]+) \| `(opt\([^`]+)` \|$",
    (DOCS / "method.md").read_text(),
    re.MULTILINE,
)


def test_every_row_of_the_papers_tables_is_listed():
    listed = {name: {int(n) for n in re.findall(r"\d", tables)} for name, tables, _ in METHODS}
    assert len(listed) == len(METHODS) == 17
    for table, rows in TABLES.items():
        assert {name for name, tables in listed.items() if table in tables} == rows


@pytest.mark.filterwarnings("ignore:U has a negative eigenvalue:UserWarning")
@pytest.mark.parametrize("name, _tables, code", METHODS, ids=[name for name, *_ in METHODS])
def test_every_row_of_the_papers_tables_takes_a_step(name, _tables, code):
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(16, 3))
    x, y = torch.randn(8, 1, 4, 4), torch.randint(3, (8,))
    calls = []

    def forward():
        calls.append(1)
        logits = model(x)
        return nn.functional.cross_entropy(logits, y), logits

    scope = {
        "opt": llqr.Optimizer,
        "paper": llqr.LLQR.paper,
        "llqr": llqr,
        "model": model,
        "sgd": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        "adam": torch.optim.Adam(model.parameters(), lr=1e-3),
        "adamw": torch.optim.AdamW(model.parameters(), lr=5e-4),
    }
    optimizer = eval(code, scope)
    before = [p.detach().clone() for p in model.parameters()]
    assert bool(optimizer.minimize(forward).isfinite())
    for p, old in zip(model.parameters(), before, strict=True):
        assert bool(p.isfinite().all()) and not torch.equal(p, old)
    # What the name says is what was built.
    base = "Adam" if name == "Adam" else "AdamW" if "AdamW" in name else "SGD"
    assert type(optimizer.base).__name__ == base
    kinds = {"F-SAM": "FriendlySAM", "FisherSAM": "FisherSAM", "ASAM": "ASAM", "SAM": "SAM"}
    kind = next((k for part, k in kinds.items() if part in name), "NoneType")
    assert type(optimizer.perturbation).__name__ == kind
    assert optimizer.transport is (name != DELTA)
    probes = kind != "NoneType" and "warm-up" not in name and "AdamW" not in name
    geometry = optimizer.geometry
    # The first refresh of a kind of forward runs it once more, to compare the library with torch.
    assert len(calls) - (1 + probes + (geometry is not None)) in (0, int(geometry is not None))
    assert (geometry is not None) is ("LLQR" in name)
    if geometry is not None:
        curvature = llqr.Newton if "Newton" in name else llqr.Fisher
        assert type(geometry.curvature) is curvature
        assert optimizer.last_report.accepted and optimizer.last_report.change > 0


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
