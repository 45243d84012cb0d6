"""Products, refreshes and steps on the device against the same in float64 on the CPU."""

from __future__ import annotations

import torch
from common import Classifier
from torch import Tensor

import llqr

from ._report import Report
from .compare import (
    PROBES,
    WAYS,
    apart,
    differing,
    directions,
    geometry_of,
    learned,
    llqr_of,
    optimizer_of,
    weights,
)
from .nets import net

F64, F32 = torch.float64, torch.float32
#: What rounding may cost: products, what a refresh learned, weights after a few steps.
BOUNDS = {F64: 1e-9, F32: 1e-4}
LEARNED = {F64: 1e-8, F32: 2e-3}
STRUCTURES = ("scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense")


def run(report: Report) -> None:
    """Run all checks, with TF32 off."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for name in NETS_AND_MODES:
        for curvature in ("fisher", "newton"):
            for dtype in (F64, F32):
                report.check(
                    f"products, {short(dtype)}: {name}, {curvature}",
                    lambda n=name, c=curvature, d=dtype: product_error(n, c, report.device, d),
                    BOUNDS[dtype],
                )
    for structure in STRUCTURES:
        for settings in ({}, {"block_size": 4}, {"tolerance": 0}, {"curvature": "newton"}):
            said = ", ".join(map(str, settings.values())) if settings else "default"
            said = said.replace("4", "blocks of 4").replace("0", "literal loop")
            name = "mlp" if structure == "dense" else "conv-bn"
            for dtype in (F64, F32) if "tolerance" in settings else (F64,):
                report.check(
                    f"refresh, {short(dtype)}: {structure}, {said}",
                    lambda s=structure, kw=settings, n=name, d=dtype: refresh_error(
                        n, s, kw, report.device, d
                    ),
                    LEARNED[dtype],
                )
    for name in ("attention", "embedding", "lstm", "gru", "conv-transpose", "tied"):
        report.check(
            f"refresh, float64: kfac of {name}",
            lambda n=name: refresh_error(n, "kfac", {}, report.device, F64),
            LEARNED[F64],
        )
    report.check(
        "refresh, float64: e-kfac with gradient bases",
        lambda: refresh_error("conv-bn", "e-kfac", {"bases": "gradient"}, report.device, F64),
        LEARNED[F64],
    )
    for probe in PROBES:
        for geometry in (None, "diagonal", "kfac", "e-kfac"):
            report.check(
                f"steps, float64: {probe}, U {geometry}",
                lambda p=probe, g=geometry: step_error(p, g, "minimize", report.device),
                LEARNED[F64],
            )
    for way in WAYS:
        report.check(
            f"ways, float64: {way}",
            lambda w=way: step_error("FriendlySAM", "kfac", w, report.device),
            LEARNED[F64],
        )
    report.check("weights come back: after an error in the second pass", lambda: kept(report), 0)


def short(dtype: torch.dtype) -> str:
    """Return float64, not torch.float64."""
    return str(dtype).removeprefix("torch.")


#: The convolutional net also with the statistics of the batch.
NETS_AND_MODES = {
    "mlp": True,
    "conv-bn": True,
    "conv-bn in eval": False,
    "attention": True,
    "embedding": True,
    "lstm": True,
    "lstm in eval": False,
    "gru in eval": False,
    "conv-transpose": True,
    "tied": True,
}


def product_error(name: str, curvature: str, device: str, dtype: torch.dtype) -> float:
    """Return the error of g and of C d for three d."""

    def vectors(p: Classifier) -> list[Tensor]:
        p.model.train(NETS_AND_MODES[name])
        parameters = list(p.model.parameters())
        model = llqr.quadratic_model(p, parameters, curvature)
        images = [model.product(d) for d in directions(parameters)]
        return [v for vs in (model.gradient, *images) for v in vs]

    plain = name.removesuffix(" in eval")
    return apart(vectors(net(plain, device, dtype)), vectors(net(plain, "cpu")))


def refresh_error(
    name: str, structure: str, settings: dict[str, object], device: str, dtype: torch.dtype
) -> float:
    """Return the error of what one refresh learned."""
    here = learned(net(name, device, dtype), llqr_of(structure, **settings))
    return apart(here, learned(net(name, "cpu"), llqr_of(structure, **settings)))


def step_error(probe: str, geometry: str | None, way: str, device: str, steps: int = 3) -> float:
    """Return the error of the weights and buffers after steps with refreshes in them."""

    def trained(p: Classifier) -> list[Tensor]:
        options = {"geometry": geometry_of(geometry), "perturbation": PROBES[probe]()}
        optimizer = optimizer_of(p, **options)
        for _ in range(steps):
            WAYS[way](optimizer, p)
        return weights(p)

    return apart(trained(net("conv-bn", device)), trained(net("conv-bn", "cpu")))


def kept(report: Report) -> int:
    """Return how many weights an error in the second pass changed."""
    p = net("conv-bn", report.device, F32)
    optimizer = optimizer_of(p, perturbation=llqr.SAM(0.1))
    before = [q.detach().clone() for q in p.model.parameters()]
    moved = 0
    try:
        for i in optimizer.passes():
            p()[0].backward()
            if i:
                moved = differing(before, list(p.model.parameters()))
                raise KeyError("in the second pass")
    except KeyError:
        pass
    if not moved:
        raise AssertionError("the second pass ran at the unperturbed weights")
    return differing(before, [q.detach() for q in p.model.parameters()])
