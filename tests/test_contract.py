"""The public contract where no other test holds it: names, signatures, defaults, arrows."""

import ast
import inspect
import logging
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import llqr
from tiny import llqr_of, mlp, optimizer_of, train

SOURCE = Path(llqr.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
REQUIRED = inspect.Parameter.empty
PROBED = {"along": "metric", "start": 0, "interval": 1}


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
                "every": llqr.growing(5, 500),
                "steps": 50,
                "lr": "auto",
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
                "batch_norm": "batch",
            },
        ),
        (
            llqr.NaturalGradient,
            {"structure": "e-kfac"},
            {
                "curvature": "fisher",
                "samples": 8,
                "damping": 0.03,
                "power": 1.0,
                "ema": 0.9,
                "every": llqr.growing(10, 500, rate=3),
                "second_moment": "samples",
                "gradient_ema": 0.95,
                "renew_every": 2,
                "block_size": 512,
                "seed": 0,
                "start": 0,
                "max_failures": None,
                "shard": False,
                "batch_norm": "batch",
                "report_J": False,
            },
        ),
        (llqr.growing, {"first": REQUIRED, "last": REQUIRED, "rate": 4}, {}),
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
        (llqr.SAM, {"rho": 0.05}, {"norm": "metric", "direction": "raw", **PROBED}),
        (llqr.ASAM, {"rho": 0.5}, {"eta": 0.01, "start": 0, "interval": 1}),
        (llqr.FisherSAM, {"rho": 0.1}, {"eta": 0.1, "start": 0, "interval": 1}),
        (
            llqr.FriendlySAM,
            {"rho": 0.1},
            {"sigma": 1.0, "decay": 0.9, "norm": "metric", **PROBED},
        ),
        (llqr.LookSAM, {"rho": 0.05}, {"alpha": 0.7, **PROBED, "interval": 5}),
        (llqr.GSAM, {"rho": 0.05}, {"alpha": 0.4, **PROBED}),
        (llqr.WSAM, {"rho": 0.05}, {"gamma": 0.9, **PROBED}),
        (llqr.ESAM, {"rho": 0.05}, {"beta": 0.6, "seed": 0, **PROBED}),
        (llqr.MSAM, {"rho": 0.3}, {"start": 0, "interval": 1}),
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
        (llqr.find_rho, ["optimizer", "forward", "batches", "rhos", "progress"]),
        (llqr.find_inner_lr, ["geometry", "forward", "batches", "lrs", "progress"]),
        (llqr.sharpness.eigenvalues, ["forward", "parameters", "k", "curvature"]),
        (llqr.sharpness.trace, ["forward", "parameters", "curvature"]),
        (llqr.sharpness.density, ["forward", "parameters", "curvature"]),
        (llqr.sharpness.worst_case, ["forward", "parameters", "rho", "norm"]),
        (llqr.sharpness.m_sharpness, ["forward", "parameters", "rho", "norm"]),
        (llqr.sharpness.landscape, ["forward", "parameters", "directions"]),
    ],
)
def test_functions_take_their_arguments_by_these_names(function, names):
    assert [n for n in parameters(function) if n in names] == names


def test_the_version_is_that_of_the_package():
    assert llqr.__version__ == version("llqr")


def test_the_release_is_described():
    """The changelog and the citation are of this version."""
    root = SOURCE.parents[1]
    newest = re.findall(r"^## \[(\d\S*)\] - (\S+)$", (root / "CHANGELOG.md").read_text(), re.M)[0]
    citation = (root / "CITATION.cff").read_text()
    cited = re.findall(r'^(?:version|date-released): "?([^"\n]+)', citation, re.M)
    assert newest == tuple(cited) and cited[0] == llqr.__version__


def test_every_supported_torch_has_a_session():
    """One for each minor version, from the oldest that the package accepts."""
    root = SOURCE.parents[1]
    least = re.search(r'"torch>=2\.(\d+)"', (root / "pyproject.toml").read_text())[1]
    text = (root / "noxfile.py").read_text()
    minors = [int(n) for n in re.findall(r'^    "2\.(\d+)\.\d+": "3\.\d+",$', text, re.M)]
    assert minors == list(range(int(least), minors[-1] + 1)) and minors[-1] >= 14


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


def imports(file, running=False):
    """The modules that a file names in its imports, also within functions, in full.

    ``running`` leaves out those that only a type checker sees.
    """
    tree = ast.parse(file.read_text())
    hints = [node for node in ast.walk(tree) if is_type_checking(node)] if running else []
    hidden = {id(n) for node in hints for part in node.body for n in ast.walk(part)}
    package = ("llqr", *file.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_type_checking(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


PARTS = [
    f"_{n}.py" for n in ("optimizer", "update", "passes", "refresher", "checkpoint", "parameters")
]
UPSTAIRS = [f"llqr.{name.removesuffix('.py')}" for name in PARTS]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_are_torchs_and_the_standard_librarys(file):
    roots = {name.partition(".")[0] for name in imports(file, running=True)}
    assert roots <= {"torch", "llqr", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "part, unknown",
    [
        ("_vectors.py", (*UPSTAIRS, "llqr.perturbations", "llqr.geometry", "llqr.curvature")),
        ("distributed", (*UPSTAIRS, "llqr.perturbations", "llqr.geometry", "llqr.curvature")),
        ("curvature", (*UPSTAIRS, "llqr.perturbations", "llqr.geometry")),
        ("geometry", (*UPSTAIRS, "llqr.perturbations")),
        ("geometry/layout", ("llqr.geometry.structures", "llqr.geometry.inner_solve")),
        ("geometry/structures", ("llqr.geometry.inner_solve", "llqr.curvature")),
        ("geometry/inner_solve", ("torch.nn.Module", "torch.distributed")),
        ("perturbations", (*UPSTAIRS, "llqr.geometry", "llqr.curvature")),
        *(
            (p, ("llqr.sharpness", "llqr.finding"))
            for p in ("geometry", "perturbations", "curvature", *PARTS)
        ),
        ("sharpness", ("llqr._optimizer", "llqr.finding")),
        *(
            (file, tuple(f"llqr.geometry.{n}" for n in ("LLQR", "_llqr", "_natural_gradient")))
            for file in PARTS
        ),
        *((file, ("llqr._optimizer",)) for file in PARTS if file != "_optimizer.py"),
    ],
)
def test_arrows_go_one_way(part, unknown):
    """Nothing in the optimizer or the perturbations knows LLQR; curvature knows neither."""
    path = SOURCE / part
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    found = {name for file in files for name in imports(file)}
    assert found and not [n for n in found for u in unknown if n == u or n.startswith(u + ".")]


def test_files_do_not_import_each_other_in_circles():
    """Counting imports for type hints, and those of packages as their ``__init__``."""
    modules = {module_name(file): file for file in FILES if file.name != "__init__.py"}
    arrows = {name: set(imports(file)) & set(modules) for name, file in modules.items()}

    def below(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in arrows[name]:
                below(other, [*path, name])
            done.add(name)

    done: set[str] = set()
    for name in modules:
        below(name, [])
    assert len(done) > 50


def module_name(file):
    return ".".join(("llqr", *file.relative_to(SOURCE).with_suffix("").parts))


def test_what_perturbed_cannot_know_is_documented():
    text = " ".join((llqr.Optimizer.perturbed.__doc__ or "").split())
    assert "random state before the clean backward is not known here, nor are the buffers" in text
    assert "passes" in text
