"""A training step with U against the same without: SGD and LLQR, SAM and LLQR+SAM.

"step" is the time over that of the base method; "at 500" adds the share of a refresh every 500
steps (and so on), from the refresh measured here, with LLQR's default settings. "apply" is U g
alone, in plain steps. "own" is what minimize spends outside of forward, backward and the base's
step, likewise: a difference of clocks within one step, where quotients of two steps differ by what
else the machine does. "sam / hand" is this library's SAM over a SAM step written out for one model,
without its checks and its restoring of buffers, in calls for all parameters; "sam / loops" over one
that goes through the parameters one by one, as the usual implementations of SAM do.

With ``--hand`` instead: each step over that SAM step written out, beside two usual implementations:
davda54's update, also written out, and pytorch_optimizer's SAM, if it is installed.
Small networks are timed over ten steps of a method at a time, as a training runs them.

With ``--probes`` instead: a step with each perturbation over SGD's, without a geometry. Those that
probe every 5 steps are timed over the 5, and the quotient is the mean.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import PROBLEMS, Classifier, Clock, arguments, optimizer_of, problem, show
from refresh import NATURAL, STRUCTURES, Refresh
from torch import nn

import llqr

SMALL = ("small mlp", "small cnn", "tiny tensors")
APPLIED = {
    **STRUCTURES,
    "kfac 512 bfloat16": {**STRUCTURES["kfac 512"], "application": "bfloat16"},
    "kfac 512 low-rank": {**STRUCTURES["kfac 512"], "application": "low-rank"},
    "e-kfac 512 low-rank": {**STRUCTURES["e-kfac 512"], "application": "low-rank"},
    **{
        f"natural {structure}": {"kind": llqr.NaturalGradient, "structure": structure}
        for structure in NATURAL
    },
}


PROBES = {
    "SAM": lambda: llqr.SAM(0.05),
    "SAM, every 5": lambda: llqr.SAM(0.05, interval=5),
    "LookSAM, every 5": lambda: llqr.LookSAM(0.05),
    "MSAM": lambda: llqr.MSAM(0.05),
    "GSAM": lambda: llqr.GSAM(0.05),
    "WSAM": lambda: llqr.WSAM(0.05),
    "ESAM": lambda: llqr.ESAM(0.05),
}


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, models=(*PROBLEMS, *SMALL), structures=tuple(APPLIED))
    parser.add_argument("--probes", action="store_true")
    parser.add_argument("--hand", action="store_true")
    parser.add_argument("--batch", type=int, help="of the large networks")
    parser.add_argument("--inner-steps", type=int, default=2, help="of the refresh with --hand")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        large = name not in SMALL
        p = problem(name, options.device, options.batch) if large else small(name, options.device)
        if options.probes or options.hand:
            make = probe_row if options.probes else hand_row
            rows.append(make(name, p, Clock(options.device), options))
            print(rows[-1], flush=True)
            continue
        for structure in options.structures:
            rows.append(row(name, structure, p, Clock(options.device), options))
            print(rows[-1], flush=True)
    show("A step, over the base method's", rows, options)


def small(name: str, device: str) -> Classifier:
    """Networks whose step is mostly Python: 9 thousand parameters, 6 thousand, 400 tensors."""
    torch.manual_seed(0)
    if name == "tiny tensors":
        return Classifier(TinyTensors(400), torch.randn(8, 3), torch.randint(400, (8,)), device)
    if name == "small mlp":
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        return Classifier(
            nn.Sequential(*layers), torch.randn(64, 64), torch.randint(10, (64,)), device
        )
    layers = []
    for a, b in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))
    return Classifier(model, torch.randn(32, 1, 8, 8), torch.randint(10, (32,)), device)


class TinyTensors(nn.Module):
    """A linear map whose rows are parameters of their own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(rows)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.stack(list(self.rows)).T


def written_out(p: Classifier, base: torch.optim.Optimizer, rho: float) -> None:
    """Do a SAM step by hand."""
    parameters = list(p.model.parameters())
    base.zero_grad()
    p()[0].backward()
    with torch.no_grad():
        g = [q.grad for q in parameters if q.grad is not None]
        norm = torch.stack(torch._foreach_norm(g)).norm() + 1e-12
        old = [q.clone() for q in parameters]
        torch._foreach_add_(parameters, torch._foreach_mul(g, rho / norm))
    base.zero_grad()
    p()[0].backward()
    with torch.no_grad():
        torch._foreach_copy_(parameters, old)
    base.step()


def written_out_in_loops(p: Classifier, base: torch.optim.Optimizer, rho: float) -> None:
    """Do a SAM step by hand, one parameter at a time."""
    parameters = list(p.model.parameters())
    base.zero_grad()
    p()[0].backward()
    with torch.no_grad():
        norm = torch.stack([q.grad.norm() for q in parameters if q.grad is not None]).norm()
        old = []
        for q in parameters:
            old.append(q.clone())
            if q.grad is not None:
                q.add_(q.grad * (rho / (norm + 1e-12)))
    base.zero_grad()
    p()[0].backward()
    with torch.no_grad():
        for q, value in zip(parameters, old, strict=True):
            q.copy_(value)
    base.step()


def own(optimizer: llqr.Optimizer, p: Classifier, clock: Clock, repeats: int) -> float:
    """Return the median seconds of a minimize without forward, backward and the base's step."""
    inside = [0.0]

    def timed(call: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            result: list[Any] = []
            inside[0] += clock(lambda: result.append(call(*args, **options)))
            return result[0]

        return run

    seconds, backward = [], torch.Tensor.backward
    torch.Tensor.backward = timed(backward)  # type: ignore[method-assign]
    optimizer.base.step = timed(optimizer.base.step)  # type: ignore[method-assign]
    try:
        for _ in range(repeats + 1):
            inside[0] = 0.0
            seconds.append(clock(lambda: optimizer.minimize(timed(p))) - inside[0])
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        del optimizer.base.step
    return statistics.median(seconds[1:])


def row(
    name: str, structure: str, p: Classifier, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the methods in turns."""
    settings = {**APPLIED[structure], "every": 10**9}
    kind = settings.pop("kind", llqr.LLQR)
    base = torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)

    def sgd() -> None:
        base.zero_grad()
        p()[0].backward()
        base.step()

    refresh = Refresh(p, kind, **settings)
    refresh()
    if kind is llqr.NaturalGradient:  # later ones do not decompose
        took = clock(lambda: [refresh.optimizer.refresh(p) for _ in range(2)]) / 2
    else:
        took = clock(refresh)
    plain = optimizer_of(p, refresh.geometry)
    sam = optimizer_of(p, None, perturbation=llqr.SAM(0.05))
    both_geometry = kind(**settings)
    both = optimizer_of(p, both_geometry, perturbation=llqr.SAM(0.05))
    both.refresh(p)
    p.step()
    gradient = {n: q.grad.clone() for n, q in p.model.named_parameters() if q.grad is not None}
    repeats = options.repeats if name not in SMALL else 100 * options.repeats
    times = clock.medians(
        {
            "step": p.step,
            "sgd": sgd,
            "llqr": lambda: plain.minimize(p),
            "sam": lambda: sam.minimize(p),
            "hand": lambda: written_out(p, base, 0.05),
            "loops": lambda: written_out_in_loops(p, base, 0.05),
            "llqr+sam": lambda: both.minimize(p),
            "apply": lambda: refresh.geometry.apply(gradient),
        },
        repeats,
    )
    found: dict[str, Any] = {
        "model": f"{name} B{len(p.x)}",
        "structure": structure,
        "apply": times["apply"] / times["step"],
        "refresh": took / times["step"],
        "own, llqr": own(plain, p, clock, repeats) / times["step"],
        "own, sam": own(sam, p, clock, repeats) / times["step"],
        "own, llqr+sam": own(both, p, clock, repeats) / times["step"],
        "sam / hand": times["sam"] / times["hand"],
        "sam / loops": times["sam"] / times["loops"],
        "llqr+sam / hand": times["llqr+sam"] / times["hand"],
    }
    for method, against in (("llqr", "sgd"), ("llqr+sam", "sam")):
        found[f"{method} / {against}"] = times[method] / times[against]
        for every in (100, 500, 1500):
            share = times[method] + took / every
            found[f"{method} at {every}"] = share / times[against]
    return found


def davda54(p: Classifier, base: torch.optim.Optimizer, rho: float) -> None:
    """Do a SAM step as the implementation that most copy: one parameter at a time, on .data."""
    parameters, old = list(p.model.parameters()), {}
    p()[0].backward()
    with torch.no_grad():
        norm = torch.norm(torch.stack([q.grad.norm(p=2) for q in parameters]), p=2)
        scale = rho / (norm + 1e-12)
        for q in parameters:
            old[q] = q.data.clone()
            q.add_(q.grad * scale.to(q))
    base.zero_grad()
    p()[0].backward()
    for q in parameters:
        q.data = old[q]
    base.step()
    base.zero_grad()


def pytorch_optimizers(p: Classifier, rho: float) -> dict[str, Any]:
    """Return a step of pytorch_optimizer's SAM, if it is installed."""
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        return {}
    sam = SAM(p.model.parameters(), torch.optim.SGD, rho=rho, lr=1e-3, momentum=0.9)

    def step() -> None:
        p()[0].backward()
        sam.first_step(zero_grad=True)
        p()[0].backward()
        sam.second_step(zero_grad=True)

    return {"pytorch_optimizer's SAM": step}


def hand_row(name: str, p: Classifier, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Time SAM, alone and under each structure, in turns with the SAM steps of others."""
    base = torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)

    def sgd() -> None:
        base.zero_grad()
        p()[0].backward()
        base.step()

    calls: dict[str, Any] = {
        "hand": lambda: written_out(p, base, 0.05),
        "sgd": sgd,
        "davda54's": lambda: davda54(p, base, 0.05),
        **pytorch_optimizers(p, 0.05),
    }
    errors: dict[str, float] = {}
    for structure in ("none", *options.structures):
        geometry = None
        if structure != "none":
            settings = {**APPLIED[structure], "every": 10**9}
            kind = settings.pop("kind", llqr.LLQR)
            geometry = kind(
                **settings, **({"steps": options.inner_steps} if kind is llqr.LLQR else {})
            )
        optimizer = optimizer_of(p, geometry, perturbation=llqr.SAM(0.05))
        if geometry is not None:
            optimizer.refresh(p)
            errors |= {f"error, {structure}": error_of_application(p, geometry)}
        label = "SAM" if geometry is None else f"SAM, {structure}"
        calls[label] = lambda optimizer=optimizer: optimizer.minimize(p)
    many = 10 if name in SMALL else 1
    repeated = {
        label: lambda call=call: [call() for _ in range(many)] for label, call in calls.items()
    }
    repeats = options.repeats if name not in SMALL else 20 * options.repeats
    times = clock.medians(repeated, repeats, warm=2)
    ratios = {label: times[label] / times["hand"] for label in calls if label != "hand"}
    return {"model": f"{name} B{len(p.x)}", "hand s": times["hand"] / many} | ratios | errors


def error_of_application(p: Classifier, geometry: llqr.StructuredGeometry) -> float:
    """Return |V g - U g| / |U g| for V, the form of U that steps apply."""
    p.step()
    g = {n: q.grad for n, q in p.model.named_parameters() if q.grad is not None}
    exact = geometry.blocks.apply_to_tensors(geometry.states, g)
    applied = geometry.apply(g)
    pairs = [(applied[n] - exact[n], exact[n]) for n in g]
    off, whole = (torch.stack([t.norm() for t in ts]).norm() for ts in zip(*pairs, strict=True))
    return float(off / whole)


def probe_row(
    name: str, p: Classifier, clock: Clock, options: argparse.Namespace
) -> dict[str, Any]:
    """Time a step with each perturbation in turns with a step of SGD."""
    base = torch.optim.SGD(p.model.parameters(), lr=1e-3, momentum=0.9)

    def sgd() -> None:
        base.zero_grad()
        p()[0].backward()
        base.step()

    def steps(optimizer: llqr.Optimizer, count: int) -> Any:
        return lambda: [optimizer.minimize(p) for _ in range(count)]

    probes = {probe: make() for probe, make in PROBES.items()}
    calls = {
        probe: steps(optimizer_of(p, None, perturbation=perturbation), perturbation.interval)
        for probe, perturbation in probes.items()
    }
    repeats = options.repeats if name not in SMALL else 30 * options.repeats
    times = clock.medians({"sgd": sgd, **calls}, repeats, warm=2)
    return {"model": f"{name} B{len(p.x)}"} | {
        probe: times[probe] / perturbation.interval / times["sgd"]
        for probe, perturbation in probes.items()
    }


if __name__ == "__main__":
    main()
