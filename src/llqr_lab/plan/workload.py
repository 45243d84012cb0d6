"""The network that is planned for, on the meta device: nothing is downloaded or computed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.registry import MODELS

__all__ = ["PlanError", "Workload", "load_workload"]


class PlanError(ValueError):
    """What was asked for cannot be planned; the message is for the user."""


@dataclass
class Workload:
    """A network with one batch, on the meta device.

    Attributes:
        name: as it was asked for.
        model: the network.
        inputs: what it is called with.
        named: the same, by name.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    named: dict[str, Tensor]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (loss, outputs): a cross-entropy over the last dimension of the outputs."""
        z = self.model(*self.inputs, **self.named)
        z = z if isinstance(z, Tensor) else z.logits
        flat = z.reshape(-1, z.shape[-1])
        targets = torch.zeros(len(flat), dtype=torch.long, device=z.device)
        return F.cross_entropy(flat, targets), z

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]


def load_workload(
    spec: str,
    batch: int,
    input_shape: tuple[int, ...],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Build a network on the meta device.

    Args:
        spec: a name of this project's networks (``resnet18``), ``package.module:factory``,
            ``timm/NAME``, or ``transformers/CLASS`` with the class of a configuration, or
            ``transformers/FILE.json`` with a configuration as the library saves it.
        batch: of a device.
        input_shape: (channels, height, width) of images, (features,), or (tokens,) of a language
            model, whose inputs are whole numbers.
        settings: arguments of the factory or fields of the configuration.
        dtype: of the parameters.

    Raises:
        PlanError: there is no such network, or a library is missing.
    """
    build, tokens = _find_builder(spec, input_shape)
    with torch.device("meta"):
        try:
            model = build(**settings)
        except TypeError as error:
            raise PlanError(f"{spec}: {error}; --set KEY=VALUE gives arguments") from error
        if tokens:
            inputs = torch.zeros(batch, *input_shape, dtype=torch.long)
        else:
            inputs = torch.empty(batch, *input_shape, dtype=dtype)
    named = {}
    if tokens:  # without a mask, transformers would look at numbers for packed sequences
        shape = batch, 1, *input_shape, *input_shape
        named["attention_mask"] = torch.zeros(shape, dtype=dtype, device="meta")
    return Workload(spec, model.to(dtype), (inputs,), named)


def _find_builder(spec: str, shape: tuple[int, ...]) -> tuple[Callable[..., nn.Module], bool]:
    """Return what builds the network, and whether it reads tokens."""
    if spec.startswith("timm/"):
        timm = _import("timm", spec)
        return lambda **s: timm.create_model(spec.removeprefix("timm/"), **s), False
    if spec.startswith("transformers/"):
        return _transformers_builder(spec), len(shape) == 1
    if ":" in spec:
        module, _, factory = spec.partition(":")
        found = getattr(_import(module, spec), factory, None)
        if found is None:
            raise PlanError(f"{spec}: {module} has no {factory!r}")
        return found, False
    if spec in MODELS:
        return lambda **s: MODELS[spec](s.pop("classes", 1000), **s), False
    raise PlanError(
        f"{spec}: expected package.module:factory, timm/NAME, transformers/CONFIG or one of "
        f"{', '.join(MODELS)}"
    )


def _transformers_builder(spec: str) -> Callable[..., nn.Module]:
    transformers = _import("transformers", spec)
    name = spec.removeprefix("transformers/")
    saved = json.loads(Path(name).read_text()) if name.endswith(".json") else {}

    def build(**settings: Any) -> nn.Module:
        if saved:
            fields = {**saved, **settings}
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif (kind := getattr(transformers, name, None)) is not None:
            config = kind(**settings)
        else:
            raise PlanError(f"{spec}: transformers has no {name!r}")
        for auto in ("AutoModelForCausalLM", "AutoModelForImageClassification"):
            kinds = getattr(transformers, auto)
            if type(config) in kinds._model_mapping:
                # Its own tricks would ask tensors for their numbers.
                config._attn_implementation = "sdpa"
                config.use_cache = False
                return kinds.from_config(config)
        raise PlanError(f"{spec}: {name} is neither a language model nor an image classifier")

    return build


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PlanError(f"{spec}: cannot import {module} ({error})") from error
