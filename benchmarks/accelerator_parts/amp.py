"""Mixed precision, memory formats, compiled and recurrent nets, checkpoints, random numbers."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from common import Classifier
from torch import Tensor

import llqr

from ._report import Report
from .compare import apart, differing, learned, llqr_of, optimizer_of, snapshot, weights
from .nets import net

F64, F32 = torch.float64, torch.float32


def run(report: Report) -> None:
    """Run all checks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = report.device
    for name, run_one in {
        "fp16: a step that overflows halves the scale and changes nothing": overflow,
        "fp16: from a scale of 2^40 the scaler comes down and training goes on": huge_scale,
    }.items():
        for probe in ("none", "SAM", "FriendlySAM"):
            report.check(f"{name}, {probe}", lambda f=run_one, q=probe: f(device, q), 0)
    for dtype in (torch.bfloat16, torch.float16):
        for structure in ("diagonal", "kfac", "e-kfac"):
            report.check(
                f"autocast: {str(dtype)[6:]}, SAM + {structure}, loss after over before",
                lambda d=dtype, s=structure: trained(device, d, s),
                0.9,
            )
    report.check("channels_last: steps as without", lambda: channels_last(device), 1e-8)
    for kind in ("lstm", "gru"):
        for dtype, bound in ((F64, 1e-8), (F32, 2e-3)):
            report.check(
                f"recurrent: {kind} {str(dtype)[6:]}, refresh and step in training mode",
                lambda k=kind, d=dtype: recurrent(device, k, d),
                bound,
            )
    report.check("checkpoint: device to CPU and back", lambda: round_trip(device), 0)
    for probe in ("SAM", "FriendlySAM"):
        for structure in ("diagonal", "kfac", "e-kfac"):
            report.check(
                f"resume: bitwise, {probe} + {structure}",
                lambda q=probe, s=structure: resume(device, q, s),
                0,
            )
    report.check("random state: masks of the second pass", lambda: masks(device), 0)
    report.check("compile: steps as in eager mode", lambda: compiled(report), 1e-3)


def probe_of(name: str) -> llqr.Perturbation | None:
    """Return a perturbation by its name."""
    return None if name == "none" else getattr(llqr, name)(0.05)


def start(device: str, probe: str, dtype: torch.dtype, **settings: Any) -> llqr.Optimizer:
    """An optimizer of the convolutional net under autocast; its forward is ``.forward``."""
    p = net("conv-bn", device, F32, autocast=dtype)
    optimizer = optimizer_of(p, geometry=llqr_of("kfac", **settings), perturbation=probe_of(probe))
    optimizer.forward = p
    return optimizer


def overflow(device: str, probe: str) -> tuple[int, str]:
    """Return what a step with infinite gradients changed."""
    optimizer = start(device, probe, torch.float16)
    p, scaler = optimizer.forward, torch.amp.GradScaler(device, init_scale=2.0**10)
    optimizer.minimize(p, scaler=scaler)
    before, scale = snapshot(optimizer), scaler.get_scale()

    def infinite() -> tuple[Tensor, Tensor]:
        loss, z = p()
        return loss * math.inf, z

    optimizer.minimize(infinite, refresh=p, scaler=scaler)
    if scaler.get_scale() != scale / 2:
        raise AssertionError(f"the scale went from {scale} to {scaler.get_scale()}")
    after = snapshot(optimizer)
    optimizer.minimize(p, scaler=scaler)
    if not differing(after["model"], snapshot(optimizer)["model"]):
        raise AssertionError("the next step did not move the weights")
    return differing(before, after), ""


def huge_scale(device: str, probe: str) -> tuple[int, str]:
    """Return how many weights are not finite after the scale has come down by itself."""
    # Clean and finite at once: the loss itself overflows nothing, its scaled gradients do.
    optimizer = start(device, probe, torch.float16)
    p, scaler = optimizer.forward, torch.amp.GradScaler(device, init_scale=2.0**40)
    before, skipped = weights(p), 0
    for _ in range(40):
        scale = scaler.get_scale()
        optimizer.minimize(p, scaler=scaler)
        skipped += scaler.get_scale() < scale
    if skipped < 5 or apart(weights(p), before) == 0:
        raise AssertionError(f"{skipped} steps were skipped; expected several, and then training")
    return sum(int((~w.isfinite()).sum()) for w in weights(p)), f"{skipped} steps skipped"


def trained(device: str, dtype: torch.dtype, structure: str) -> tuple[float, str]:
    """Return the loss after 20 steps over the loss at first."""
    p = net("conv-bn", device, F32, autocast=dtype)
    geometry = llqr_of(structure, every=5)
    optimizer = optimizer_of(p, geometry=geometry, perturbation=llqr.SAM(0.05))
    scaler = torch.amp.GradScaler(device) if dtype == torch.float16 else None
    losses = [float(optimizer.minimize(p, scaler=scaler)) for _ in range(20)]
    return losses[-1] / losses[0], f"{optimizer.last_report}"


def channels_last(device: str) -> float:
    """Return how far the weights are from those in the usual format."""

    def steps(memory_format: torch.memory_format) -> list[Tensor]:
        p = net("conv-bn", device)
        p.model.to(memory_format=memory_format)
        p.x = p.x.contiguous(memory_format=memory_format)
        optimizer = optimizer_of(p, geometry=llqr_of("kfac"), perturbation=llqr.SAM(0.1))
        for _ in range(3):
            optimizer.minimize(p)
        if not p.model[0].weight.is_contiguous(memory_format=memory_format):
            raise AssertionError("a step changed the memory format of the weights")
        return weights(p)

    return apart(steps(torch.channels_last), steps(torch.contiguous_format))


def recurrent(device: str, kind: str, dtype: torch.dtype) -> float:
    """Return the error of the U of a recurrent net, and of steps with it."""

    def run_on(p: Classifier) -> list[Tensor]:
        images = learned(p, llqr_of("kfac", tolerance=0))
        geometry = llqr_of("kfac", tolerance=0)
        optimizer = optimizer_of(p, geometry=geometry, perturbation=llqr.SAM(0.1))
        for _ in range(3):
            optimizer.minimize(p)
        return [*images, *weights(p)]

    enabled = torch.backends.cudnn.enabled
    error = apart(run_on(net(kind, device, dtype)), run_on(net(kind, "cpu")))
    if torch.backends.cudnn.enabled is not enabled:
        raise AssertionError("a refresh changed torch.backends.cudnn.enabled")
    return error


def saved(optimizer: llqr.Optimizer) -> io.BytesIO:
    """Return a checkpoint as a file."""
    file = io.BytesIO()
    torch.save({"model": optimizer.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file


def load(optimizer: llqr.Optimizer, file: io.BytesIO, device: str | None) -> None:
    """Load it, as a user does."""
    file.seek(0)
    state = torch.load(file, map_location=device, weights_only=True)
    optimizer.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def round_trip(device: str) -> int:
    """Return what changed in a checkpoint on its way to the CPU and back."""

    def fresh(where: str) -> tuple[Classifier, llqr.Optimizer]:
        p = net("conv-bn", where, F32)
        geometry, probe = llqr_of("kfac"), llqr.FriendlySAM(0.1)
        return p, optimizer_of(p, geometry=geometry, perturbation=probe)

    p, there = fresh(device)
    for _ in range(3):
        there.minimize(p)
    q, on_cpu = fresh("cpu")
    load(on_cpu, saved(there), "cpu")
    r, back = fresh(device)
    load(back, saved(on_cpu), None)  # saved on the CPU, loaded into a model on the device
    changed = differing(snapshot(there), snapshot(back))
    for problem, optimizer in ((q, on_cpu), (r, back)):
        optimizer.minimize(problem)  # training goes on in both places
    return changed


def resume(device: str, probe: str, structure: str) -> int:
    """Return how many numbers differ between 6 steps, and 3 + a checkpoint + 3."""

    def fresh() -> tuple[Classifier, llqr.Optimizer]:
        p = net("conv-bn", device, F32)
        return p, optimizer_of(p, geometry=llqr_of(structure), perturbation=probe_of(probe))

    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        p, whole = fresh()
        for step in range(6):
            if step == 3:
                file = saved(whole)
            whole.minimize(p)
        q, resumed = fresh()
        load(resumed, file, None)
        for _ in range(3):
            resumed.minimize(q)
    finally:
        torch.use_deterministic_algorithms(was)
    return differing(snapshot(whole), snapshot(resumed))


def masks(device: str) -> int:
    """Return how many entries of the dropout masks differ between the passes of a step."""
    p = net("dropout", device, F32)
    optimizer = optimizer_of(p, perturbation=llqr.SAM(0.1))
    for _ in range(3):
        optimizer.minimize(p)
    first = p.model.masks
    if not differing(first[0], first[2]):
        raise AssertionError("two steps have the same masks")
    return sum(differing(first[i], first[i + 1]) for i in (0, 2, 4))


def compiled(report: Report) -> tuple[float, str]:
    """Return how far steps of a compiled model are from those in eager mode."""
    backend = "aot_eager" if report.reduced else "inductor"

    def steps(compile_it: bool) -> list[Tensor]:
        p = net("conv-bn", report.device, F32)
        plain = p.model
        if compile_it:
            p.model = torch.compile(plain, backend=backend)
        # In float32, rounding could decide how many products the fast loop takes.
        geometry = llqr_of("kfac", tolerance=0)
        optimizer = optimizer_of(p, geometry=geometry, perturbation=llqr.SAM(0.1))
        for _ in range(4):
            optimizer.minimize(p)
        p.model = plain
        return weights(p)

    return apart(steps(True), steps(False)), backend
