"""What only some versions of the library have; a visible "skipped" where this one does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from common import Classifier
from torch import Tensor

import llqr

from ._report import Report, Unsupported
from .compare import apart, directions, learned, llqr_of, optimizer_of, weights
from .nets import net
from .speed import make, measure_refresh

STRUCTURES = ("diagonal", "kfac", "e-kfac")


def run(report: Report) -> None:
    """Run all checks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = report.device
    for structure in STRUCTURES:
        for name in ("mlp", "conv-bn", "attention", "lstm", "tied"):
            report.check(
                f"NaturalGradient, float64: {structure} of {name}, U",
                lambda s=structure, n=name: natural_gradient_error(n, s, device),
                1e-8,
            )
    for name, settings in {
        "MSAM": {"rho": 0.1},
        "LookSAM": {"rho": 0.1, "interval": 2},
        "GSAM": {"rho": 0.1},
        "SAM": {"rho": 0.1, "along": "gradient"},
        "ASAM": {"rho": 0.3, "interval": 2},
    }.items():
        said = ", ".join(f"{k}={v}" for k, v in settings.items())
        for geometry in (None, "kfac"):
            report.check(
                f"steps, float64: {name}({said}), U {geometry}",
                lambda n=name, kw=settings, g=geometry: step_error(n, kw, g, device),
                1e-8,
            )
    for settings in ({"batch_norm": "batch"}, {"batch_norm": "running"}, {"lr": "auto"}):
        said = ", ".join(f"{k}={v}" for k, v in settings.items())
        report.check(
            f"LLQR, float64: {said}, U", lambda kw=settings: refresh_error(kw, device), 1e-8
        )
    report.check("several bases, float64: SGD and AdamW", lambda: bases_error(device), 1e-8)
    for kind in ("NaturalGradient", "GradientMoments"):
        report.check(
            f"steps in the bases of U, float64: {kind}, against SGD without U",
            lambda k=kind: rotation_error(k, device),
            1e-8,
        )
    report.check("GradientMoments, float64: kfac, U", lambda: moments_error(device), 1e-8)
    for curvature in ("fisher", "newton"):
        report.check(
            f"sharpness, float64: eigenvalues, {curvature}",
            lambda c=curvature: eigenvalue_error(c, device),
            1e-5,
        )
    model = make("resnet18", device, report.reduced)
    for structure in STRUCTURES:
        if hasattr(llqr, "NaturalGradient"):
            measure_refresh(report, "resnet18", lambda: model, llqr.NaturalGradient, structure, {})
        else:
            report.check(f"resnet18: refresh of NaturalGradient {structure}", missing_natural)


def part_of_llqr(name: str, **options: Any) -> Callable[..., Any]:
    """Return llqr.<name>, if there is one and it has these options."""
    found = getattr(llqr, name, None)
    if found is None:
        raise Unsupported(f"llqr has no {name}")
    known = inspect.signature(found).parameters
    lacking = [option for option in options if option not in known]
    if lacking:
        raise Unsupported(f"llqr.{name} has no option {', '.join(lacking)}")
    return found


def missing_natural() -> float:
    """Say that there is no NaturalGradient."""
    part_of_llqr("NaturalGradient")
    raise AssertionError("llqr.NaturalGradient appeared in between")


def natural_gradient_error(name: str, structure: str, device: str) -> float:
    """Return the error of U from the same samples."""
    kind = part_of_llqr("NaturalGradient")

    def U_of(where: str) -> list[Tensor]:
        p = net(name, where)
        torch.manual_seed(0)  # should it draw from the global generators
        return learned(p, kind(structure, every=2))

    return apart(U_of(device), U_of("cpu"))


def step_error(name: str, settings: dict[str, Any], geometry: str | None, device: str) -> float:
    """Return the error of the weights after steps of a perturbation."""
    kind = part_of_llqr(name, **settings)

    def trained(p: Classifier) -> list[Tensor]:
        metric = None if geometry is None else llqr_of(geometry)
        optimizer = optimizer_of(p, geometry=metric, perturbation=kind(**settings))
        for _ in range(5):
            optimizer.minimize(p)
        return weights(p)

    return apart(trained(net("conv-bn", device)), trained(net("conv-bn", "cpu")))


def refresh_error(settings: dict[str, Any], device: str) -> float:
    """Return the error of U under settings that this version may not have."""
    part_of_llqr("LLQR", **settings)
    try:
        geometries = [llqr_of("kfac", **settings) for _ in range(2)]
    except (TypeError, ValueError) as error:
        raise Unsupported(f"llqr.LLQR refuses {settings}: {error}") from None
    on_device, on_cpu = (
        learned(net("conv-bn", where), geometry)
        for where, geometry in zip((device, "cpu"), geometries, strict=True)
    )
    return apart(on_device, on_cpu)


def bases_error(device: str) -> float:
    """Return the error of the weights after steps with a base for matrices and one for the rest."""

    def trained(p: Classifier) -> list[Tensor]:
        wide = [q for q in p.model.parameters() if q.dim() > 1]
        rest = [q for q in p.model.parameters() if q.dim() <= 1]
        bases = [torch.optim.SGD(wide, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-3)]
        try:
            optimizer = llqr.Optimizer(
                bases, p.model, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.1)
            )
        except TypeError as error:
            raise Unsupported(f"llqr.Optimizer takes one base: {error}") from None
        for _ in range(4):
            optimizer.minimize(p)
        return weights(p)

    return apart(trained(net("conv-bn", device)), trained(net("conv-bn", "cpu")))


def rotation_error(name: str, device: str) -> float:
    """Return how far SGD in the bases of U goes from SGD without U, which it should not."""
    kind = part_of_llqr(name)

    def trained(**options: Any) -> list[Tensor]:
        p = net("conv-bn", device)
        optimizer = optimizer_of(p, **options)
        for _ in range(6):
            optimizer.minimize(p)
        return weights(p)

    every = {"NaturalGradient": "every", "GradientMoments": "renew_every"}[name]
    return apart(trained(geometry=kind("kfac", **{every: 2}), transport="bases"), trained())


def moments_error(device: str) -> float:
    """Return the error of the U that steps leave."""
    kind = part_of_llqr("GradientMoments")

    def U_of(where: str) -> list[Tensor]:
        p = net("conv-bn", where)
        geometry = kind("kfac", renew_every=2)
        optimizer = optimizer_of(p, geometry=geometry)
        for _ in range(5):
            optimizer.minimize(p)
        named = dict(p.model.named_parameters())
        images = (
            geometry.apply(dict(zip(named, d, strict=True))) for d in directions(named.values())
        )
        return [x for image in images for x in image.values()]

    return apart(U_of(device), U_of("cpu"))


def eigenvalue_error(curvature: str, device: str) -> float:
    """Return the error of the largest eigenvalues of C."""
    sharpness = getattr(llqr, "sharpness", None)
    if sharpness is None or not hasattr(sharpness, "eigenvalues"):
        raise Unsupported("llqr has no sharpness.eigenvalues")

    def numbers(p: Classifier) -> list[Tensor]:
        torch.manual_seed(0)
        found = sharpness.eigenvalues(p, list(p.model.parameters()), k=3, curvature=curvature)
        values = getattr(found, "values", found)
        return [torch.as_tensor(values, dtype=torch.float64)]

    return apart(numbers(net("mlp", device)), numbers(net("mlp", "cpu")))
