"""Table 9: how many numbers U stores, counted on the modules themselves (meta device)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import llqr
from llqr_lab.models.vit import SIZES, VisionTransformer

from .findings import ERRATUM, Finding

__all__ = ["MODELS", "Storage", "check_storage", "model_on_meta", "storage_table", "stored_numbers"]

STRUCTURES = ("e-kfac", "diag-kfac")
SHARDS = (1, 4)
MEBIBYTE = 2**20
FP32 = 4

# The paper's first row is named ViT-Ti/16, but its parameters are those of patch 8 on 64 x 64
# images with 200 classes. The last row is what that name stands for elsewhere.
MODELS = {
    "ViT-Ti/16": dict(**SIZES["Ti"], patch=8, image=64, classes=200),
    "ViT-B/16": dict(**SIZES["B"], patch=16, image=224, classes=1000),
    "ViT-L/16": dict(**SIZES["L"], patch=16, image=224, classes=1000),
    "ViT-Ti/16 at 224": dict(**SIZES["Ti"], patch=16, image=224, classes=1000),
}


@dataclass(frozen=True)
class Storage:
    """A row of the table: numbers stored, and MiB of them in fp32 on each device.

    U is cut evenly over ``shards`` devices; the parameters are on every one.
    """

    model: str
    structure: str
    shards: int
    params: int
    preconditioner: int

    @property
    def preconditioner_mib(self) -> float:
        """4 N / 2^20 over the shards."""
        return FP32 * self.preconditioner / self.shards / MEBIBYTE

    @property
    def total_mib(self) -> float:
        """The part of U and all parameters."""
        return self.preconditioner_mib + FP32 * self.params / MEBIBYTE

    def plain_row(self) -> dict[str, str | int | float]:
        """Return the row as the paper prints it, MiB to two decimals."""
        return {
            **vars(self),
            "preconditioner_mib": round(self.preconditioner_mib, 2),
            "total_mib": round(self.total_mib, 2),
        }


def model_on_meta(name: str) -> VisionTransformer:
    """Return a model of the table without memory for its weights."""
    with torch.device("meta"):
        return VisionTransformer(**MODELS[name])


def stored_numbers(model: torch.nn.Module, structure: str) -> int:
    """Count the numbers of U over the model, blocks whole as in the paper."""
    geometry = llqr.LLQR(structure, block_size=None)
    geometry.bind(model)
    return geometry.numel()


def storage_table() -> list[Storage]:
    """Return the rows of Table 9, and those of ViT-Ti/16 on ImageNet."""
    rows = []
    for name in MODELS:
        model = model_on_meta(name)
        params = sum(p.numel() for p in model.parameters())
        for structure in STRUCTURES:
            stored = stored_numbers(model, structure)
            rows += [Storage(name, structure, shards, params, stored) for shards in SHARDS]
    return rows


def check_storage() -> list[Finding]:
    """Compare the table's first row with ViT-Ti/16 on ImageNet."""
    rows = {(row.model, row.structure, row.shards): row for row in storage_table()}
    named, real = (
        [rows[name, s, 1] for s in STRUCTURES] for name in ("ViT-Ti/16", "ViT-Ti/16 at 224")
    )
    return [
        Finding(
            "Table 9",
            "the row ViT-Ti/16 is ImageNet geometry",
            ERRATUM,
            named[0].params == 5_427_080 != real[0].params,
            {
                "printed parameters": 5_427_080,
                "patch 8, 64 x 64, 200 classes": named[0].params,
                "patch 16, 224 x 224, 1000 classes": real[0].params,
                "its e-kfac numbers": real[0].preconditioner,
                "its diag-kfac numbers": real[1].preconditioner,
            },
            "It is ViT-Ti with patch 8 on 64 x 64 images and 200 classes; B/16 and L/16 are at 224 "
            "with 1000 classes.",
        )
    ]
