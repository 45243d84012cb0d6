"""Every network: its parameter count, its shapes, one training step, one refresh of LLQR."""

import math

import pytest
import torch
from torch import Tensor, nn

import llqr
from llqr_lab.data.tokens import EOS
from llqr_lab.models.registry import MODELS, SMALL, build_network

# name, classes, parameters
COUNTS = [
    ("resnet18", 10, 11_173_962),
    ("resnet18", 100, 11_220_132),
    ("resnet18", 200, 11_271_432),
    ("vgg16-bn", 10, 14_728_266),
    ("vgg16-bn", 100, 14_774_436),
    ("wrn-28-10", 10, 36_479_194),
    ("wrn-28-10", 100, 36_536_884),
    ("pyramidnet-110", 10, 28_485_477),
    ("resnet50", 1000, 25_557_032),
    ("vit-ti16", 1000, 5_717_416),
    ("vit-s16", 1000, 22_050_664),
    ("vit-b16", 1000, 86_567_656),
    ("vit-l16", 1000, 304_326_632),
]
SIDES = {"resnet50": 224, "vit-ti16": 224, "vit-s16": 224, "vit-b16": 224, "vit-l16": 224}
SETTINGS = {"transformer-iwslt": dict(source=11), "small-cnn": dict(channels=3, image=32)}


@pytest.mark.parametrize(("name", "classes", "count"), COUNTS)
def test_parameters_and_logits_of_the_papers_network(name: str, classes: int, count: int):
    with torch.device("meta"):
        model = build_network(name, classes)
        side = SIDES.get(name, 32)
        assert model(torch.empty(2, 3, side, side)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", ["resnet18", "wrn-28-10"])
def test_tiny_imagenet_has_images_of_64(name: str):
    with torch.device("meta"):
        assert build_network(name, 200)(torch.empty(2, 3, 64, 64)).shape == (2, 200)


def test_alpha_widens_a_pyramid_in_equal_steps():
    model = build_network("pyramidnet-110", 10, depth=20, alpha=48)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert widths[1::2] == [round(16 + 48 * k / 9) for k in range(1, 10)]


@pytest.mark.parametrize("name", ["wrn-28-10", "pyramidnet-110", "resnet18", "vgg16-bn"])
def test_sides_that_are_no_power_of_two(name: str):
    model = build_network(name, 10, small=True, channels=1)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wrn-28-10", dict(depth=27), "depth: expected 6 n"),
        ("pyramidnet-110", dict(depth=27), "depth: expected 6 n"),
        ("pyramidnet-110", dict(alpha=-1), "alpha: expected a number >= 0"),
        ("resnet-18", {}, "name: expected one of resnet18, "),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        build_network(name, 10, **settings)


def loss_of(name: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    if name == "transformer-iwslt":
        source = torch.randint(3, 11, (4, 6))
        target = torch.randint(3, 10, (4, 5))
        prefix = torch.cat([torch.full((4, 1), EOS), target[:, :-1]], dim=1)
        z, y = model(source, prefix).flatten(0, 1), target.flatten()
    else:
        z, y = model(torch.randn(4, 3, 32, 32)), torch.randint(10, (4,))
    return nn.functional.cross_entropy(z, y), z


@pytest.mark.parametrize("name", MODELS)
def test_the_small_network_trains_and_its_metric_can_be_learned(name: str):
    model = build_network(name, 10, small=True, **SETTINGS.get(name, {}))
    assert sum(p.numel() for p in model.parameters()) < 250_000
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model, geometry=llqr.LLQR("diagonal", steps=5)
    )
    state = torch.get_rng_state()

    def forward() -> tuple[Tensor, Tensor]:
        torch.set_rng_state(state)  # the same batch in every call
        return loss_of(name, model)

    loss = float(optimizer.minimize(forward))
    report = optimizer.last_report
    assert report is not None and report.accepted, report
    assert report.J_after < report.J_before
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert math.isfinite(loss)


def test_there_is_a_small_version_of_each():
    assert SMALL.keys() == MODELS.keys()
