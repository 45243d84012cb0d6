"""The public contract where no other test holds it: names, signatures, defaults, arrows."""

import ast
import inspect
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import llqr
from tiny import llqr_of, mlp, optimizer_of, train

SOURCE = Path(llqr.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
REQUIRED = inspect.Parameter.empty


def parameters(function):
    """{name: (kind, default)}, self left out."""
    found = inspect.signature(function).parameters
    return {n: (p.kind.name, p.default) for n, p in found.items() if n != "self"}


def expected(positional, keywords):
    return {
        **{n: ("POSITIONAL_OR_KEYWORD", v) for n, v in positional.items()},
        **{n: ("KEYWORD_ONLY", v) for n, v in keywords.items()},
    }


@pytest.mark.parametrize(
    "function, positional, keywords",
    [
        (
            llqr.Optimizer,
            {"base": REQUIRED, "model": REQUIRED},
            {
                "geometry": None,
                "perturbation": None,
                "transport": True,
                "graft": False,
                "buffers": "clean",
                "replay_rng": True,
                "refresh_forward": None,
            },
        ),
        (
            llqr.LLQR,
            {"structure": "diagonal"},
            {
                "curvature": "fisher",
                "every": 500,
                "steps": 50,
                "lr": 1e-2,
                "momentum": 0.9,
                "clip": 5.0,
                "ema": 0.95,
                "damping": 0.0,
                "scale": "mean",
                "bases": "learned",
                "constraint": "positive",
                "bounds": (1e-3, 1e3),
                "block_size": 512,
                "tolerance": 1e-2,
                "solver": "momentum",
                "start": 0,
            },
        ),
        (
            llqr.Optimizer.minimize,
            {"forward": REQUIRED},
            {"refresh": None, "weights": None, "scaler": None, "before_step": None},
        ),
        (llqr.Optimizer.refresh, {"forward": None}, {"weights": None}),
        (llqr.Optimizer.refresh_if_due, {"forward": None}, {"weights": None}),
        (llqr.Optimizer.passes, {"scaler": None}, {}),
        (llqr.Optimizer.perturbed, {"scaler": None}, {}),
        (llqr.Optimizer.load_state_dict, {"state_dict": REQUIRED}, {}),
        (llqr.SAM, {"rho": 0.05}, {"norm": "metric", "direction": "raw"}),
        (llqr.ASAM, {"rho": 0.5}, {"eta": 0.01}),
        (llqr.FisherSAM, {"rho": 0.1}, {"eta": 0.1}),
        (llqr.FriendlySAM, {"rho": 0.1}, {"sigma": 1.0, "decay": 0.9, "norm": "metric"}),
    ],
)
def test_signatures_hold_what_was_promised(function, positional, keywords):
    """More keywords may come; none goes, moves or changes its default."""
    found = parameters(function)
    promised = expected(positional, keywords)
    assert {n: found.get(n) for n in promised} == promised
    assert all(kind == "KEYWORD_ONLY" for n, (kind, _) in found.items() if n not in positional)


@pytest.mark.parametrize(
    "function, names",
    [
        (llqr.quadratic_model, ["forward", "parameters", "curvature"]),
        (llqr.exact_lqr_step, ["layers", "x", "loss", "curvature", "damping"]),
    ],
)
def test_functions_take_their_arguments_by_these_names(function, names):
    assert [n for n in parameters(function) if n in names] == names


def test_the_version_is_that_of_the_package():
    assert llqr.__version__ == version("llqr")


def test_it_logs_and_never_prints(capsys, caplog):
    problem = mlp()
    optimizer = optimizer_of(problem, geometry=llqr_of(), perturbation=llqr.SAM())
    with caplog.at_level(logging.INFO, "llqr"):
        train(optimizer, problem, 3)
    assert capsys.readouterr() == ("", "")
    assert {record.name for record in caplog.records} == {"llqr"}
    calls = [
        node.func.id
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert "print" not in calls and "isinstance" in calls


def imports(file):
    """The modules that a file names in its imports, also within functions, in full."""
    package = ("llqr", *file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_are_torchs_and_the_standard_librarys(file):
    roots = {name.partition(".")[0] for name in imports(file)}
    assert roots <= {"torch", "llqr", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "part, unknown",
    [
        ("curvature", ("llqr._optimizer", "llqr.geometry", "llqr._perturbations", "llqr._passes")),
        ("geometry", ("llqr._optimizer", "llqr._perturbations", "llqr._passes")),
        ("_perturbations.py", ("llqr._optimizer", "llqr.geometry", "llqr.curvature")),
        ("_optimizer.py", ("llqr.geometry.LLQR", "llqr.geometry._llqr")),
        ("_passes.py", ("llqr.geometry",)),
        ("_refreshing.py", ("llqr.geometry.LLQR", "llqr.geometry._llqr")),
    ],
)
def test_arrows_go_one_way(part, unknown):
    """Nothing in the optimizer or the perturbations knows LLQR; curvature knows neither."""
    path = SOURCE / part
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    found = {name for file in files for name in imports(file)}
    assert found and not [n for n in found for u in unknown if n == u or n.startswith(u + ".")]


def test_what_perturbed_cannot_know_is_documented():
    text = " ".join((llqr.Optimizer.perturbed.__doc__ or "").split())
    assert "random state before the clean backward is not known" in text
    assert "passes" in text
