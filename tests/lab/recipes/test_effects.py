"""Every key of every recipe either changes the run that is made, or is refused by name."""

import itertools
import re
from functools import cache, wraps

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from llqr_lab.cli import main
from llqr_lab.data.images import Images, Split
from llqr_lab.data.pairs import Pairs
from llqr_lab.protocols import EXPERIMENTS, slug
from llqr_lab.recipes import build, cadence, images, loop, text
from llqr_lab.recipes.config import RECIPES, compose_config, resolve_config, written_keys
from llqr_lab.recipes.effects import (
    keys_with_effect,
    refuse_keys_without_effect,
    refuse_unknown_keys,
)
from llqr_lab.recipes.records import Records
from llqr_lab.recipes.run import TIMINGS, describe_run, make_task, task_keys
from llqr_lab.recipes.workers import Workers

# What a run is called, where it is written, and how often: tested with the runs themselves.
BESIDE = {"recipe", "dataset", "model", "method", "scale", "out", "device", "threads", "force"}
BESIDE |= {"tracker", "checkpoint_every", "keep_every", "log_every", "data", "read"}
BESIDE |= {f"input.{key}" for key in ("rand_augment", "mixup", "cutmix")}  # in test_packaged.py
BESIDE |= {"network.small"}  # of the networks' own tests: those of the paper are large
OTHER = {
    "seed": [1],
    "noise": [0.5],
    "workers": [3],
    "train.schedule": ["constant", "cosine"],
    "train.precision": ["bfloat16", "float32"],
    "base.optimizer": ["AdamW", "SGD"],
    "base.betas": [[0.5, 0.6]],
    "llqr.structure": ["kfac", "diagonal"],
    "llqr.curvature": ["newton", "fisher"],
    "llqr.solver": ["adam", "momentum"],
    "llqr.ema": [0.5, 0.25],
    "optimizer.transport": [False, True],
    "llqr.scale": ["mean", "sum"],
    "llqr.bases": ["gradient", "learned"],
    "llqr.constraint": ["positive", "none"],
    "llqr.batch_norm": ["batch", "running"],
    "probe.kind": ["FriendlySAM", "SAM"],
    "refresh.batch": [4],
    "train.batch": [3],
    "network.depth": [14, 16],
    "network.layers": [3],
    "network.heads": [4, 1],
    "network.width": [8, 64],
    "probe.norm": ["euclidean"],
    "optimizer.buffers": ["clean", "perturbed"],
    "network.stages": [[[4], [4]]],
    "network.dropout": [0.25],
    "input.bpe": [60],
    "input.holdout": [3],
    "input.limit": [5],
    "report.length_penalty": [0.5],
    "probe.along": ["gradient", "metric"],
    "probe.form": ["kim"],
    "probe.memory_start": ["gradient"],
}
MODEL = {"table1": "wrn-28-10", "table2": "vgg16-bn", "table4": "pyramidnet-110"}


def other_values(key, value):
    """Values that a key may have instead of its own."""
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2 or 2]
    return [value / 2 or 0.25] if isinstance(value, float) else [2, 0.25, True]


@cache
def few_pictures(*_):
    draws = torch.Generator().manual_seed(0)
    parts = [
        Images(
            torch.randint(256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8),
            torch.randint(10, (n,), generator=draws),
            10,
        )
        for n in (300, 9)
    ]
    return Split(*parts)


@cache
def few_pairs(*_):
    words = "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
    pairs = [(f"{a} {b}", f"{b} {a} {a}") for a, b in itertools.product(words, words)]
    return Pairs(pairs, pairs[:20], pairs[:20])


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(images, "READERS", dict.fromkeys(images.READERS, few_pictures))
    monkeypatch.setattr(images, "digit_images", few_pictures)
    monkeypatch.setattr(text, "number_words", few_pairs)
    monkeypatch.setattr(text, "libreoffice_help", few_pairs)
    monkeypatch.setattr(torch, "compile", lambda model: lambda *x: model(*x))
    # What the parts of a method are made with.
    for name in ("Optimizer", "LLQR", "NaturalGradient", "GradientMoments"):
        monkeypatch.setattr(build.llqr, name, noting_arguments(getattr(build.llqr, name)))


def noting_arguments(made):
    class Noting(made):
        @wraps(made.__init__)  # what it takes decides which keys have an effect
        def __init__(self, *args, **given):
            super().__init__(*args, **given)
            self.given = given

    return Noting


def seen_by(task, forward_of):
    """The loss of a pass through a network that only looks at what it is given."""
    seen = []
    classes = len(task.target) if hasattr(task, "target") else 10

    def model(*x):
        for given in x:
            values = given.detach().double().flatten()
            seen.append((tuple(given.shape), float(values @ torch.arange(len(values)).double())))
        draws = torch.Generator().manual_seed(1)
        shape = x[1].shape if len(x) == 2 else x[0].shape[:1]
        return torch.randn(*shape, classes, generator=draws)

    return float(forward_of(model)()[0].detach()), seen


def description_of(config, monkeypatch):
    """What is made of a configuration: network, optimizer, schedule, data, evaluation."""
    about = describe_run(config)
    workers = Workers("cpu")
    if about["recipe"] in TIMINGS:
        return timing_of(config, workers, monkeypatch)
    task = make_task(config, workers, about)
    training = loop.Training(config, task, workers, Records())
    asked = {}
    if hasattr(task, "bleu_of"):
        monkeypatch.setattr(text, "translate_all", lambda *_, **given: asked.update(given) or [])
        monkeypatch.setattr(text, "corpus_bleu", lambda *_: 0.0)
        task.bleu_of(task.valid)
    loaders = []
    real = torch.utils.data.DataLoader
    with monkeypatch.context() as patch:

        def loader(*given, num_workers, **rest):
            loaders.append(num_workers)
            return real(*given, num_workers=0, **rest)

        patch.setattr(torch.utils.data, "DataLoader", loader)
        batch = next(task.batches(0, 0))
    for p in task.network.parameters():
        p.grad = torch.ones_like(p)
    training._clip_gradients()
    return {
        "steps": (training.steps, task.steps),
        "optimizer": optimizer_text(training.optimizer),
        "schedule": [type(training.schedule).__name__, *lrs_of(training)],
        "network": network_text(task.network),
        "weights": float(sum(p.detach().double().sum() for p in task.network.parameters())),
        "clipped": float(next(task.network.parameters()).grad.flatten()[0]),
        "mixed": training._in_precision(lambda: torch.is_autocast_enabled("cpu"))(),
        "compiled": training.compiled is training.model,
        "batch": seen_by(task, lambda model: task.forward(model, batch, 0)),
        "refresh": training.optimizer.geometry
        and seen_by(task, lambda model: task.refresh(model, 0)),
        "data": task.data_about,
        "evaluated": [*map(str, sorted(asked.items())), *loaders],
    }


def optimizer_text(optimizer):
    probe = optimizer.perturbation
    return [
        type(optimizer.base).__name__,
        str(optimizer.base.defaults),
        str(optimizer.geometry and optimizer.geometry.given),
        probe and (type(probe).__name__, str(sorted(vars(probe).items(), key=str))),
        str({k: v for k, v in optimizer.given.items() if isinstance(v, (bool, str))}),
    ]


def network_text(network):
    heads = [m.heads for m in network.modules() if hasattr(m, "heads")]
    return f"{network} {[tuple(p.shape) for p in network.parameters()]} {heads}"


def lrs_of(training):
    schedule = training.schedule
    if hasattr(schedule, "lr_lambdas"):
        return [schedule.lr_lambdas[0](k) for k in (0, 3, 5000)]
    return [schedule.base_lrs, getattr(schedule, "T_max", 0), getattr(schedule, "eta_min", 0)]


def timing_of(config, workers, monkeypatch):
    """What a timing computes; the optimizer only counts."""
    seen = []
    real_optimizer, real_pictures = cadence.optimizer_of, cadence._random_pictures

    def counting_optimizer(config, model):
        optimizer = real_optimizer(config, model)
        seen.extend([*optimizer_text(optimizer), network_text(model)])
        optimizer.refresh = lambda forward: seen.append("refresh")
        optimizer.minimize = lambda forward: seen.append("step") or forward()
        optimizer.passes = lambda: ()
        return optimizer

    def pictures(*given):
        x, y = real_pictures(*given)
        seen.append((tuple(x.shape), float(x.sum()), float(y.sum())))
        return x, y

    def autocast(*_, enabled):
        seen.append(enabled)
        return torch.no_grad()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda model: seen.append("compiled") or model)
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(cadence, "optimizer_of", counting_optimizer)
        patch.setattr(cadence, "_random_pictures", pictures)
        result = cadence.measure_cadence(config, workers)
    return [seen, result["parameters"], result["data"]]


def whole_config(recipe, folder, method=None):
    methods = EXPERIMENTS[recipe].methods
    method = method if method in methods else methods[-1]
    config = compose_config(recipe, ["scale=smoke", f"method={slug(method)}"])
    config.model = MODEL.get(recipe, config.model)
    if recipe.startswith("table5"):
        config.read, config.data, config.input.image = "imagenet", str(folder), 16
    return resolve_config(config)


@pytest.fixture
def folder(tmp_path):
    draws = torch.Generator().manual_seed(0)
    for part, name, i in itertools.product(("train", "val"), "ab", range(4)):
        path = tmp_path / part / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path


# recipe -> one of the same kind of task, whose keys are all tried
LIKE = dict.fromkeys(("table2", "table3", "table4", "table7", "table8"), "table1")
LIKE |= {
    "table5-literal": "table5",
    "figure6": "table10",
    "fashion-noise": "fashion",
    "help-texts": "table6",
}


def with_other_value(config, key):
    value = OmegaConf.select(config, key)
    given = next(v for v in other_values(key, value) if v != value)
    if (key, config.model) == ("network.depth", "wrn-28-10"):
        given = 16  # 6 n + 4; the others' is 6 n + 2
    if (key, config.recipe) == ("input.holdout", "demo"):
        given = 297
    if (key, config.model) == ("network.width", "resnet50"):
        given = 4
    changed = OmegaConf.create(OmegaConf.to_container(config))
    OmegaConf.update(changed, key, given)
    return changed


def refusal_of(config):
    try:
        refuse_keys_without_effect(config, task_keys(describe_run(config)))
    except ValueError as error:
        return str(error)
    return None


def another_run(changed, key, plain, monkeypatch):
    """Tell whether a changed key makes another run, or one that the library refuses by its name."""
    try:
        return description_of(changed, monkeypatch) != plain
    except ValueError as error:
        return str(error).startswith(f"{key.rpartition('.')[2]}: ")


@pytest.mark.parametrize(
    "recipe, method",
    [
        *((name, EXPERIMENTS[name].methods[-1]) for name in RECIPES if name not in LIKE),
        ("demo", "GM+SAM/5"),
    ],
)
def test_a_key_changes_the_run_or_is_refused(recipe, method, folder, monkeypatch):
    config = whole_config(recipe, folder, method)
    assert refusal_of(config) is None  # what nobody gave is never refused
    plain = description_of(config, monkeypatch)
    for key in sorted(set(written_keys(recipe)) - BESIDE):
        changed = with_other_value(config, key)
        if said := refusal_of(changed):
            # Another class may not take what the protocol gives to its own.
            blamed = ("base.", "probe.") if key in ("base.optimizer", "probe.kind") else key
            assert said.startswith(blamed) and "has no effect on this run" in said, key
        else:
            assert another_run(changed, key, plain, monkeypatch), f"{key} changes nothing"


@pytest.mark.parametrize("recipe", LIKE)
def test_recipes_of_one_kind_take_the_same_keys(recipe, folder):
    like = whole_config(LIKE[recipe], folder)
    config = whole_config(recipe, folder, EXPERIMENTS[LIKE[recipe]].methods[-1])
    assert refusal_of(config) is None
    taken, known = (keys_with_effect(c, task_keys(describe_run(c))) for c in (config, like))
    # A network and a perturbation have keys of their own; data at hand may need no folder.
    assert {key.partition(".")[0] for key in taken ^ known} <= {"network", "probe", "data"}
    for key in sorted(set(written_keys(recipe)) - BESIDE - taken):
        said = refusal_of(with_other_value(config, key))
        assert said and said.startswith(f"{key}: "), key


def test_what_replaces_a_class_is_checked_against_it():
    """What the protocol gives to its own perturbation another may not take."""
    config = resolve_config(compose_config("table4", ["method=f-sam", "probe.kind=SAM"]))
    assert re.search("probe.(decay|sigma): .*give probe.(decay|sigma)=null", refusal_of(config))


@pytest.mark.parametrize(
    "recipe, given, said",
    [
        ("table1", ["method=sgdm", "probe.rho=0.3"], "probe.rho: .* method=sgdm has no pert"),
        ("table1", ["method=sam", "llqr.every=7"], "llqr.every: .* method=sam learns no U"),
        (
            "table1",
            ["method=sam", "input.bpe=7"],
            "input.bpe: .*of input it has input.cutmix, input.cutout",
        ),
        ("table1", ["scale=small", "data=/x"], "data: .*nothing in table1 on digits reads it"),
        ("table6", ["method=adamw", "noise=0.2"], "noise: .*keys without a group: .*read"),
        ("table6", ["method=adamw", "input.holdout=5"], "input.holdout: .*input.bpe, input.limit"),
        ("table10", ["method=sam", "train.schedule=constant"], "train.schedule: has no effect"),
        ("demo", ["method=sam", "input.limit=5"], "input.limit: .*nothing in demo on digits"),
        (
            "table1",
            ["base.optimizer=Adam"],
            "base.momentum: .*Adam does not take it; give base.mom",
        ),
        ("table7", ["probe.norm=euclidean"], "probe.norm: .*FisherSAM does not take it; leave it"),
        ("table1", ["method=sgdm", "optimizer.graft=true"], "optimizer.graft: .*sgdm learns no U"),
        ("demo", ["method=gm", "optimizer.graft=true"], "optimizer.graft: .*bases grafts nothing"),
        ("demo", ["method=gm", "refresh.batch=9"], "refresh.batch: .*gm has nothing to refresh"),
        ("demo", ["method=gm", "llqr.every=9"], "llqr.every: .*GradientMoments does not take it"),
        ("demo", ["method=gm", "probe.rho=9"], "probe.rho: .*method=gm has no perturbation"),
    ],
)
def test_the_refusal_says_the_key_why_and_what_there_is(recipe, given, said):
    method = [] if any(g.startswith("method") for g in given) else ["method=sgdm"]
    if recipe == "table7":
        method = ["method=fishersam"]
    error = refusal_of(resolve_config(compose_config(recipe, [*method, *given])))
    assert re.search(said, error or "nothing") and "\n" not in error, error


@pytest.mark.parametrize(
    "given, said",
    [
        ("base.lrr=1", "base.lrr: there is no such key; did you mean base.lr"),
        ("rho=0.1", "rho: there is no such key; did you mean probe.rho?"),
        ("sed=1", "sed: .*did you mean seed"),
        ("llqr.evry=5", "llqr.evry: .*llqr.every.* llqr has llqr.structure, llqr.curvature"),
        ("qqqqq=1", "qqqqq: .*there are: .*dataset"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(given, said, capsys):
    with pytest.raises(ValueError, match=said):
        refuse_unknown_keys("table1", ["seed=1", given])
    assert main(["run", "table1", given]) == 2
    shown = capsys.readouterr().err
    assert re.search(said, shown) and shown.count("\n") == 1


def test_hydras_own_and_known_keys_pass():
    given = ["seed=1", "base.lr=2", "hydra/launcher=x", "+new=1", "~probe.rho", "--multirun"]
    refuse_unknown_keys("table1", given)
