"""The notebooks: every cell runs, and what a cell shows can be shown."""

import ast
import json
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def run_cell(source, scope):
    """Run a cell as a notebook does; return what its last line comes to, if anything."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "cell", "exec"), scope)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch, capsys):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    pyplot.close("all")  # of other tests
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)  # stripped
    scope = {"__name__": "__main__"}
    shown = []
    with torch.random.fork_rng():
        for cell in code:
            value = run_cell("".join(cell["source"]), scope)
            if value is not None:
                shown.append(value._repr_html_())
    assert len(code) > 5 and len(shown) > 1 and all("<table" in h or "<pre" in h for h in shown)
    assert not pyplot.get_fignums()


def test_the_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["sam_in_your_own_loop", "what_the_metric_does"]
