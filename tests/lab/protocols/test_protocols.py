"""The protocols: what the paper says is there, and what is there can be built."""

import inspect
import itertools
from pathlib import Path

import pytest
import torch

import llqr
from llqr_lab.models.registry import MODELS
from llqr_lab.protocols import EXPERIMENTS, METHODS, Source, resolve_settings
from llqr_lab.protocols.experiments import OWN
from llqr_lab.protocols.page import protocols_page

ROOT = Path(__file__).parents[3]
RUNS = [
    (name, *run)
    for name, e in EXPERIMENTS.items()
    for run in itertools.product(e.datasets, e.models, e.methods)
]


def values(*run: str, part: str = "") -> dict[str, object]:
    """The values of a run, of one part under the names that follow it."""
    found = {key: setting.value for key, setting in resolve_settings(*run).items()}
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def test_the_page_is_what_the_tables_give():
    assert (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8") == protocols_page()


def test_every_table_and_figure_is_there():
    numbers = [f"table{i}" for i in (*range(1, 9), 10)] + [f"figure{i}" for i in (1, 4, 5, 6)]
    numbers.insert(numbers.index("table5") + 1, "table5-literal")
    assert list(EXPERIMENTS) == [*numbers, *OWN, "demo"]
    # Cells of the tables as printed: networks x data sets x columns.
    sizes = {"table1": 28, "table2": 28, "table3": 12, "table4": 32, "table5": 6, "table6": 4}
    sizes |= {"table7": 3, "table8": 5}
    for name, size in sizes.items():
        assert sum(run[0] == name for run in RUNS) == size, name


@pytest.mark.parametrize("run", RUNS, ids="/".join)
def test_a_run_can_be_built(run: tuple[str, str, str, str]):
    _, _, model, method = run
    kind = METHODS[method]
    arguments = values(*run, part="model")
    inspect.signature(MODELS[model]).bind(arguments.pop("classes", 10), **arguments)
    base = values(*run, part="base")
    weights = [torch.nn.Parameter(torch.zeros(2, 3))]
    optimizer = getattr(torch.optim, str(base.pop("optimizer")))(weights, **base)
    assert optimizer.defaults["lr"] == base["lr"]
    geometry = values(*run, part="llqr")
    if kind.metric is None:
        assert not geometry
    else:
        made = getattr(llqr, kind.metric)(**geometry)
        measured = getattr(made, "curvature", None)
        named = None if measured is None else type(measured).__name__.lower()
        assert named == kind.curvature
    probe = values(*run, part="probe")
    assert bool(probe) == (kind.probe is not None)
    if probe:
        assert getattr(llqr, str(probe.pop("kind")))(**probe).rho == probe["rho"]
    known = inspect.signature(llqr.Optimizer).parameters
    assert set(values(*run, part="optimizer")) <= set(known)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_llqrs_settings_on_images_are_those_that_the_library_calls_the_papers(curvature: str):
    method = {"fisher": "LLQR (NGD)", "newton": "LLQR (Newton)"}[curvature]
    settings = values("table2", "CIFAR-100", "resnet18", method, part="llqr")
    made = llqr.LLQR(settings.pop("structure"), **settings)
    paper = llqr.LLQR.paper(made.structure, curvature)
    assert made.settings == paper.settings


# What appendix C and the captions say, in a form of its own: run, key, value.
IN_THE_TEXT = [
    (("table1", "CIFAR-10", "vgg16-bn", "SGDM"), "base.lr", 0.05),
    (("table1", "CIFAR-10", "vgg16-bn", "SGDM"), "base.momentum", 0.9),
    (("table1", "CIFAR-10", "vgg16-bn", "SGDM"), "train.epochs", 200),
    (("table1", "CIFAR-10", "vgg16-bn", "SGDM"), "train.batch", 128),
    (("table1", "CIFAR-10", "vgg16-bn", "SGDM"), "search.weight_decay", (1e-4, 5e-4, 1e-3)),
    (("table1", "CIFAR-10", "resnet18", "SAM"), "probe.rho", 0.1),
    (("table2", "CIFAR-100", "resnet18", "SAM"), "probe.rho", 0.2),
    (("table2", "CIFAR-100", "resnet18", "LLQR+SAM (NGD)"), "probe.rho", 0.2),
    (("table2", "CIFAR-100", "resnet18", "FisherSAM"), "probe.rho", 0.1),
    (("table2", "CIFAR-100", "resnet18", "FisherSAM"), "probe.eta", 0.1),
    (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "llqr.ema", 0.95),
    (("table1", "CIFAR-10", "resnet18", "LLQR (Newton)"), "llqr.ema", 0.9),
    (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "llqr.lr", 1e-3),
    (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "llqr.steps", 50),
    (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "llqr.every", 500),
    (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "refresh.batch", 128),
    (("table4", "CIFAR-10", "vgg16-bn", "F-SAM"), "probe.decay", 0.6),
    (("table4", "CIFAR-100", "resnet18", "LLQR+F-SAM (NGD)"), "probe.decay", 0.6),
    (("table4", "CIFAR-100", "wrn-28-10", "F-SAM"), "probe.decay", 0.9),
    (("table4", "CIFAR-10", "pyramidnet-110", "F-SAM"), "probe.decay", 0.9),
    (("table5", "ImageNet", "resnet50", "F-SAM"), "probe.rho", 0.075),
    (("table5", "ImageNet", "resnet50", "F-SAM"), "probe.decay", 0.95),
    (("table5", "ImageNet", "resnet50", "LLQR (NGD)"), "llqr.structure", "e-kfac"),
    (("figure1", "ImageNet", "resnet50", "LLQR (NGD)"), "llqr.every", 1500),
    (("table6", "IWSLT14", "transformer-iwslt", "SAM"), "probe.rho", 0.005),
    (("table6", "IWSLT14", "transformer-iwslt", "LLQR (NGD)"), "llqr.ema", 0.925),
    (("table7", "CIFAR-100", "resnet18", "LLQR^Delta+SAM"), "optimizer.transport", False),
    (("table7", "CIFAR-100", "resnet18", "LLQR+SAM (NGD)"), "optimizer.transport", True),
    (("table8", "CIFAR-100", "resnet18", "Adam"), "data.noise", (0.2, 0.6, 0.7, 0.8)),
    (
        ("table10", "ImageNet-scale images", "vit-l16", "LLQR (NGD)"),
        "sweep.every",
        (50, 100, 200, 500, 1000, 1500),
    ),
    (
        ("figure6", "ImageNet-scale images", "vit-ti16", "LLQR (NGD)"),
        "report.exponents",
        (1.27, 1.28),
    ),
]


@pytest.mark.parametrize(("run", "key", "value"), IN_THE_TEXT)
def test_what_the_text_says_is_there_and_marked(run: tuple[str, ...], key: str, value: object):
    setting = resolve_settings(*run)[key]
    assert (setting.value, setting.source) == (value, Source.PAPER)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        (("table5", "ImageNet", "resnet50", "SGDM"), "train.epochs"),
        (("table5", "ImageNet", "resnet50", "SGDM"), "train.batch"),
        (("table5", "ImageNet", "resnet50", "SGDM"), "base.lr"),
        (("table8", "CIFAR-100", "resnet18", "Adam"), "base.lr"),
        (("table8", "CIFAR-100", "resnet18", "SAM"), "data.flip_to"),
        (("table1", "CIFAR-10", "resnet18", "LLQR (NGD)"), "llqr.structure"),
        (("table1", "CIFAR-10", "resnet18", "SGDM"), "base.weight_decay"),
    ],
)
def test_what_the_text_lacks_is_marked_as_assumed(run: tuple[str, ...], key: str):
    assert resolve_settings(*run)[key].source is Source.ASSUMED


def test_imagenet_read_literally_changes_rho_and_lambda_only():
    """Beside the data's own keys; table 5's recipe also has what is usual on ImageNet."""
    recipes = ("table1", "table5-literal", "table5")
    runs = (("CIFAR-10", "resnet18", "SGDM"), *[("ImageNet", "resnet50", "F-SAM")] * 2)
    cifar, literal, usual = (
        {k: s.value for k, s in resolve_settings(name, *run).items() if k[:6] != "report"}
        for name, run in zip(recipes, runs, strict=True)
    )
    new = {"probe.kind", "probe.norm", "probe.sigma"}
    changed = {k for k, v in literal.items() if cifar.get(k, v) != v or k not in cifar} - new
    ours = {"data.image", "data.crop", "data.padding", "data.statistics", "data.test"}
    assert changed - ours == {"probe.rho", "probe.decay"}
    assert {k for k in usual if usual[k] != literal.get(k)} == {
        *("train.epochs", "train.batch", "base.lr", "base.weight_decay"),
        *("data.cutout", "data.cutout_side"),
    }


@pytest.mark.parametrize(
    ("name", "dataset", "model", "value", "source"),
    [
        ("table2", "CIFAR-100", "resnet18", 1e-3, Source.RECIPE),
        ("table2", "CIFAR-100", "wrn-28-10", 1e-3, Source.RECIPE),
        ("table4", "CIFAR-100", "vgg16-bn", 1e-3, Source.RECIPE),
        ("table8", "CIFAR-100", "resnet18", 1e-3, Source.RECIPE),
        ("table2", "CIFAR-100", "pyramidnet-110", 5e-4, Source.ASSUMED),
        ("table4", "CIFAR-10", "resnet18", 5e-4, Source.ASSUMED),
    ],
)
def test_the_weight_decay_says_its_source(name, dataset, model, value, source):
    found = resolve_settings(name, dataset, model, "SAM")["base.weight_decay"]
    assert (found.value, found.source) == (value, source) and found.note


def test_methods_of_a_row_share_all_but_what_they_are():
    for name in ("table1", "table2", "table5", "table6"):
        e = EXPERIMENTS[name]
        for dataset, model in itertools.product(e.datasets, e.models):
            shared = [
                {
                    key: s.value
                    for key, s in resolve_settings(name, dataset, model, method).items()
                    if key.partition(".")[0] in ("data", "model", "train", "base", "report")
                }
                for method in e.methods
            ]
            assert all(one == shared[0] for one in shared), (name, model)


def test_the_steps_derived_from_table_10_give_its_column_of_updates():
    run = resolve_settings("table10", "ImageNet-scale images", "vit-b16", "LLQR (NGD)")
    images, batch, epochs = (run[f"train.{key}"].value for key in ("images", "batch", "epochs"))
    steps = epochs * -(-images // batch)
    counts = [len(range(0, steps, every)) for every in run["sweep.every"].value]
    assert counts == [32, 16, 8, 4, 2, 2]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (("table9", "CIFAR-10", "resnet18", "SGDM"), "name"),
        (("table1", "CIFAR-100", "resnet18", "SGDM"), "dataset"),
        (("table1", "CIFAR-10", "resnet50", "SGDM"), "model"),
        (("table1", "CIFAR-10", "resnet18", "Adam"), "method"),
    ],
)
def test_runs_that_are_not_in_the_paper_are_refused(run: tuple[str, ...], name: str):
    with pytest.raises(ValueError, match=f"{name}: "):
        resolve_settings(*run)
