"""How far two runs are apart, and the steps and refreshes that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from common import Classifier
from torch import Tensor

import llqr

__all__ = [
    "PROBES",
    "WAYS",
    "apart",
    "differing",
    "directions",
    "geometry_of",
    "learned",
    "llqr_of",
    "optimizer_of",
    "snapshot",
    "weights",
]


def apart(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, over the largest entry of ``b``."""
    a, b = ([t.detach().double().cpu().reshape(-1) for t in ts] for ts in (a, b))
    x, y = torch.cat(a), torch.cat(b)
    return float((x - y).abs().max() / y.abs().max())


def differing(a: Any, b: Any) -> int:
    """Return how many numbers of two nested structures are not equal bit for bit."""
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return max(a.numel(), 1)
        return int((a.cpu() != b.cpu()).sum())
    if isinstance(a, Mapping):
        return len(a.keys() ^ b.keys()) + sum(differing(a[k], b[k]) for k in a.keys() & b.keys())
    if isinstance(a, (list, tuple)):
        return abs(len(a) - len(b)) + sum(map(differing, a, b))
    return int(a != b)


def directions(parameters: Iterable[Tensor], count: int = 3) -> list[list[Tensor]]:
    """Return the same random directions for a model on any device."""
    noise = torch.Generator("cpu").manual_seed(7)
    parameters = list(parameters)
    return [
        [torch.randn(p.shape, generator=noise, dtype=torch.float64).to(p) for p in parameters]
        for _ in range(count)
    ]


def llqr_of(structure: str, **settings: Any) -> llqr.LLQR:
    """A geometry whose refresh moves U visibly."""
    chosen = {"every": 2, "steps": 8, "lr": 0.03, "ema": 0.5, "block_size": 64}
    return llqr.LLQR(structure, **{**chosen, **settings})


def geometry_of(name: str | None) -> llqr.Geometry | None:
    """The same, or none."""
    return None if name is None else llqr_of(name)


def optimizer_of(p: Classifier, lr: float = 0.05, **options: Any) -> llqr.Optimizer:
    """SGD with momentum, wrapped."""
    base = torch.optim.SGD(p.model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    return llqr.Optimizer(base, p.model, **options)


def learned(p: Classifier, geometry: llqr.Geometry) -> list[Tensor]:
    """Refresh once, and return U applied to fixed directions: independent of signs of bases."""
    optimizer = optimizer_of(p, geometry=geometry)
    report = optimizer.refresh(p)
    if not report.accepted:
        raise AssertionError(f"refused: {report.reason}")
    names = [n for n, _ in p.model.named_parameters()]
    images: list[Tensor] = []
    for d in directions(p.model.parameters()):
        u = geometry.apply(dict(zip(names, d, strict=True)))
        images += [u[n] - v for n, v in zip(names, d, strict=True)]  # U - 1: what was learned
    if not any(t.abs().max() > 1e-4 for t in images):
        raise AssertionError("U is still the identity: there is nothing to compare")
    return images


def weights(p: Classifier) -> list[Tensor]:
    """Parameters and floating-point buffers."""
    state = p.model.state_dict().values()
    return [t.detach().clone() for t in state if t.is_floating_point()]


def snapshot(optimizer: llqr.Optimizer) -> dict[str, Any]:
    """Weights, buffers and the whole state of the optimizer, copied, without wall times."""
    state = optimizer.state_dict()
    groups = [
        {k: v for k, v in g.items() if not k.endswith("seconds")} for g in state["param_groups"]
    ]
    entries = {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in e.items()}
        for i, e in state["state"].items()
    }
    model = {k: v.clone() for k, v in optimizer.model.state_dict().items()}
    return {"model": model, "state": entries, "param_groups": groups}


def _by_passes(optimizer: llqr.Optimizer, p: Classifier) -> None:
    optimizer.refresh_if_due(p)
    for _ in optimizer.passes():
        p()[0].backward()
    optimizer.step()


def _by_perturbed(optimizer: llqr.Optimizer, p: Classifier) -> None:
    optimizer.refresh_if_due(p)
    optimizer.zero_grad()
    p()[0].backward()
    if optimizer.needs_second_pass:
        with optimizer.perturbed():
            p()[0].backward()
    optimizer.step()


def _by_closure(optimizer: llqr.Optimizer, p: Classifier) -> None:
    optimizer.refresh_if_due(p)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p()[0]
        loss.backward()
        return loss

    optimizer.step(closure)


#: A step, in the four ways that there are.
WAYS: dict[str, Callable[[llqr.Optimizer, Classifier], Any]] = {
    "minimize": lambda optimizer, p: optimizer.minimize(p),
    "passes": _by_passes,
    "perturbed": _by_perturbed,
    "closure": _by_closure,
}
PROBES: dict[str, Callable[[], llqr.Perturbation | None]] = {
    "no probe": lambda: None,
    "SAM": lambda: llqr.SAM(0.1),
    "ASAM": lambda: llqr.ASAM(0.3),
    "FisherSAM": lambda: llqr.FisherSAM(0.1),
    "FriendlySAM": lambda: llqr.FriendlySAM(0.1),
}
