"""Networks of timm and torchvision, and torchvision's augmentation, in the recipes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lab.torchvision_at_hand import require_vision
from llqr_lab.cli import main
from llqr_lab.common import vision
from llqr_lab.data.torchvision_transforms import Mixing, RandAugment
from llqr_lab.models.registry import build_network
from llqr_lab.recipes.config import compose_config, resolve_config
from llqr_lab.recipes.effects import refuse_keys_without_effect
from llqr_lab.recipes.run import describe_run, task_keys
from llqr_lab.recipes.trained import load_trained


class Asked(nn.Sequential):
    """A network that remembers what it was made with."""

    def __init__(self, **given):
        super().__init__(nn.Flatten(), nn.LazyLinear(given["num_classes"]))
        self(torch.zeros(1, given["in_chans"], given["img_size"], given["img_size"]))
        self.given = given


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with one network."""
    module = SimpleNamespace(
        list_models=lambda: ["vit_tiny", "vit_small"],
        get_pretrained_cfg=lambda name: SimpleNamespace(fixed_input_size=True),
        create_model=lambda name, pretrained, **given: Asked(**given),
    )
    monkeypatch.setitem(sys.modules, "timm", module)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, capsys, tmp_path):
    for package in vision.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    for make in (lambda: RandAugment(9), lambda: Mixing(10, mixup=0.2)):
        with pytest.raises(ModuleNotFoundError, match=r"torchvision is not .* 'llqr\[vision\]'"):
            make()
    given = ["model=timm/vit_tiny", "scale=smoke", f"out={tmp_path}"]
    assert main(["run", "table1", *given]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "llqr: timm is not installed; pip install 'llqr[vision]'"


def test_a_torchvision_for_another_torch_is_told(monkeypatch):
    def unfit(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vision.importlib, "import_module", unfit)
    with pytest.raises(ValueError, match="does not fit torch .*nms.* pip install --upgrade"):
        vision.import_vision("torchvision")


@pytest.mark.parametrize(
    "recipe, model, said",
    [
        ("table1", "timm/vit_tinny", "did you mean timm/vit_tiny"),
        ("table1", "timm/vit_tiny.in1k", "did you mean timm/vit_tiny"),
        ("table1", "resnet19", r"expected one of .*resnet18.*\(or timm/NAME, torchvision/NAME\)"),
        ("table6", "timm/vit_tiny", "classifies pictures, .*expected one of transformer-iwslt"),
        ("table6", "resnet18", "expected one of transformer-iwslt, got 'resnet18'$"),
    ],
)
def test_unknown_networks_are_answered_with_the_nearest(timm, recipe, model, said):
    with pytest.raises(ValueError, match=said):
        config = resolve_config(compose_config(recipe, [f"model={model}"]))
        refuse_keys_without_effect(config, task_keys(describe_run(config)))


def test_a_recipe_trains_a_network_of_a_package(timm, tmp_path):
    given = ["method=llqr-sam", "scale=smoke", "tracker=none", f"out={tmp_path}"]
    added = "+network.drop_rate=0.1"  # handed on to timm
    assert main(["run", "table1", "model=timm/vit_tiny", added, *given]) == 0
    (found,) = tmp_path.glob("table1/smoke/cifar-10/timm-vit_tiny/llqr-sam/*/result.json")
    result = json.loads(found.read_text())
    assert result["model"] == "timm/vit_tiny"
    assert result["settings"]["model.drop_rate"] == 0.1
    assert "model.small" not in result["settings"]  # that of our networks
    _, task = load_trained(found.parent)  # of llqr sharpness
    assert task.network.given["drop_rate"] == 0.1


def test_data_and_settings_are_handed_on(timm):
    made = build_network("timm/vit_tiny", 7, small=True, channels=2, image=8, drop_rate=0.5)
    assert made.given == {"num_classes": 7, "in_chans": 2, "img_size": 8, "drop_rate": 0.5}


@pytest.mark.parametrize("key", ["network.depth=3", "network.small=true"])
def test_keys_of_our_networks_are_refused(timm, key):
    config = resolve_config(compose_config("table1", ["model=timm/vit_tiny", key]))
    with pytest.raises(ValueError, match="has no effect .*timm/vit_tiny does not take it"):
        refuse_keys_without_effect(config, task_keys(describe_run(config)))


@pytest.mark.parametrize("key", ["rand_augment", "mixup", "cutmix"])
def test_tasks_without_augmentation_refuse_it(key):
    config = resolve_config(compose_config("demo", ["method=sam", f"input.{key}=1"]))
    with pytest.raises(ValueError, match=f"input.{key}: has no effect"):
        refuse_keys_without_effect(config, task_keys(describe_run(config)))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: RandAugment(31), "input.rand_augment: expected a magnitude 0 .. 30, got 31"),
        (lambda: Mixing(10, cutmix=-1.0), "input.cutmix: expected an alpha above 0, got -1.0"),
    ],
)
def test_values_out_of_range(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# -- with the packages themselves ----------------------------------------------------------------


def test_the_augmentation_follows_from_its_generator():
    require_vision("torchvision")
    pixels = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    pixels[1:] = pixels[0]
    labels = torch.arange(6)
    augment, state = RandAugment(15), torch.get_rng_state()
    changed = augment(pixels, generator())
    assert changed.dtype == torch.uint8 and changed.shape == pixels.shape
    assert len(changed.flatten(1).unique(dim=0)) > 1  # each picture by itself
    assert torch.equal(changed, augment(pixels, generator()))
    assert not torch.equal(changed, augment(pixels, generator(1)))
    x = pixels.float()
    x += torch.arange(6.0).view(6, 1, 1, 1) * 1000
    for alphas in ({"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        mix = Mixing(6, **alphas)
        mixed, targets = mix(x, labels, generator(2))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        # The label's shares are those of the pictures: they differ by 1000 times the label.
        means = mixed.mean((1, 2, 3)) - pixels.float().mean()
        torch.testing.assert_close(means / 1000, targets @ labels.float(), rtol=0, atol=1e-2)
        assert not torch.equal(mixed, x)
        again = mix(x, labels, generator(2))
        assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])
    assert torch.equal(Mixing(6, mixup=1.0)(x[:1], labels[:1], generator())[1], torch.eye(6)[:1])
    assert torch.equal(torch.get_rng_state(), state)


MIXED = ["input.mixup=0.2", "input.cutmix=1.0", "input.rand_augment=9"]


@pytest.mark.parametrize(
    "name, given",
    [("test_vit", ["+network.patch_size=4", *MIXED]), ("test_resnet", [])],
)
def test_a_recipe_trains_a_network_of_timm(name, given, tmp_path):
    require_vision("timm", "torchvision")
    options = ["method=llqr-sam", "scale=smoke", "tracker=none", f"out={tmp_path}"]
    assert main(["run", "table1", f"model=timm/{name}", *given, *options]) == 0
    (found,) = tmp_path.rglob("result.json")
    result = json.loads(found.read_text())
    assert result["skipped_steps"] == 0 and result["settings"].get("data.mixup", 0.2) == 0.2


def test_torchvisions_networks():
    require_vision("torchvision")
    network = build_network("torchvision/squeezenet1_1", 5, channels=3, image=32)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(ValueError, match="3 channels, these have 1; timm"):
        build_network("torchvision/squeezenet1_1", 5, channels=1)
    with pytest.raises(ValueError, match="did you mean torchvision/resnet18"):
        build_network("torchvision/resnet188", 5)
    with pytest.raises(ValueError, match="no network 'fasterrcnn_resnet50_fpn' for this"):
        build_network("torchvision/fasterrcnn_resnet50_fpn", 5)
