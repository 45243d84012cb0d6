"""Tiny networks, batches and steps that the optimizer's tests share."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llqr

STRUCTURES = ("identity", "scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense")
F64 = torch.float64


class Problem:
    """A model with a batch; calling it is a forward as minimize() wants it: (loss, outputs)."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.calls = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        z = self.model(self.x)
        return nn.functional.cross_entropy(z.float() if z.dtype == torch.bfloat16 else z, self.y), z

    def loss(self) -> Tensor:
        return self()[0]

    def backward(self, factor: float = 1.0) -> Tensor:
        loss = self.loss()
        (loss * factor).backward()
        return loss.detach()

    def part(self, low: int, high: int) -> Problem:
        """The same model on some rows of the batch."""
        return Problem(self.model, self.x[low:high], self.y[low:high])

    def gradient(self) -> dict[str, Tensor]:
        """The gradient where the weights are, without a trace in p.grad."""
        named = dict(self.model.named_parameters())
        values = torch.autograd.grad(self.loss(), list(named.values()))
        return dict(zip(named, values, strict=True))


def mlp(dtype: torch.dtype = F64, seed: int = 0, rows: int = 12) -> Problem:
    """5-6-3 with tanh."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return Problem(model, torch.randn(rows, 5, dtype=dtype), torch.randint(3, (rows,)))


def dropout_mlp(dtype: torch.dtype = F64) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    return Problem(model, torch.randn(12, 5, dtype=dtype), torch.randint(3, (12,)))


def norm_net(dtype: torch.dtype = F64, dropout: float = 0.0) -> Problem:
    """Convolution, batch norm, dropout, head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).to(dtype)
    return Problem(model, torch.randn(6, 2, 4, 4, dtype=dtype), torch.randint(3, (6,)))


def identity_matrix(problem: Problem) -> llqr.FixedGeometry:
    n = sum(p.numel() for p in problem.model.parameters())
    return llqr.FixedGeometry(torch.eye(n, dtype=F64))


def random_metric(problem: Problem, seed: int = 1) -> llqr.FixedGeometry:
    """A dense symmetric positive definite U."""
    n = sum(p.numel() for p in problem.model.parameters())
    raw = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return llqr.FixedGeometry(raw @ raw.mT / n + 0.1 * torch.eye(n, dtype=F64))


def llqr_of(structure: str = "diagonal", **settings: Any) -> llqr.LLQR:
    """A geometry that refreshes often and moves visibly within a few inner steps."""
    return llqr.LLQR(structure, **{"every": 2, "steps": 4, "lr": 0.03, "ema": 0.5, **settings})


def natural_of(structure: str = "e-kfac", **settings: Any) -> llqr.NaturalGradient:
    """A geometry in closed form that refreshes often, from few samples."""
    usual = {"every": 2, "samples": 4, "damping": 0.3, "ema": 0.5, "renew_every": 1}
    return llqr.NaturalGradient(structure, **{**usual, **settings})


def sgd(problem: Problem, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(problem.model.parameters(), lr=lr, **options)


def optimizer_of(
    problem: Problem, base: torch.optim.Optimizer | None = None, **options: Any
) -> llqr.Optimizer:
    return llqr.Optimizer(
        sgd(problem, momentum=0.9) if base is None else base, problem.model, **options
    )


# -- one step, the four ways in ------------------------------------------------------------------


def by_minimize(optimizer: llqr.Optimizer, problem: Problem) -> Tensor:
    return optimizer.minimize(problem)


def by_closure(optimizer: llqr.Optimizer, problem: Problem) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return problem.backward()

    optimizer.refresh_if_due(problem)
    return optimizer.step(closure)


def by_passes(optimizer: llqr.Optimizer, problem: Problem) -> Tensor:
    losses = []
    optimizer.refresh_if_due(problem)
    for _ in optimizer.passes():
        losses.append(problem.backward())
    optimizer.step()
    return losses[0]


def by_perturbed(optimizer: llqr.Optimizer, problem: Problem) -> Tensor:
    optimizer.refresh_if_due(problem)
    if looks_ahead(optimizer):
        with optimizer.perturbed():
            loss = problem.backward()
    else:
        optimizer.zero_grad()
        loss = problem.backward()
        if optimizer.needs_second_pass:
            with optimizer.perturbed():
                problem.backward()
    optimizer.step()
    return loss


def looks_ahead(optimizer: llqr.Optimizer) -> bool:
    """Whether the body of perturbed() is the only pass."""
    return optimizer.perturbation is not None and optimizer.perturbation.looks_ahead


WAYS: dict[str, Callable[[llqr.Optimizer, Problem], Tensor]] = {
    "minimize": by_minimize,
    "closure": by_closure,
    "passes": by_passes,
    "perturbed": by_perturbed,
}


def train(optimizer: Any, problem: Problem, steps: int, way: str = "minimize") -> list[float]:
    return [float(WAYS[way](optimizer, problem)) for _ in range(steps)]


def train_plainly(base: torch.optim.Optimizer, problem: Problem, steps: int) -> list[float]:
    """The loop without this library."""
    losses = []
    for _ in range(steps):
        base.zero_grad()
        losses.append(float(problem.backward()))
        base.step()
    return losses


# -- the same with a GradScaler ------------------------------------------------------------------


def scaler_of(scale: float = 2.0**10, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


Scaler = torch.amp.GradScaler


def scaled_minimize(optimizer: llqr.Optimizer, problem: Problem, scaler: Scaler) -> None:
    optimizer.minimize(problem, scaler=scaler)


def scaled_passes(optimizer: llqr.Optimizer, problem: Problem, scaler: Scaler) -> None:
    optimizer.refresh_if_due(problem)
    for _ in optimizer.passes(scaler):
        scaler.scale(problem.loss()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def scaled_passes_without_unscale(
    optimizer: llqr.Optimizer, problem: Problem, scaler: Scaler
) -> None:
    optimizer.refresh_if_due(problem)
    for _ in optimizer.passes(scaler):
        scaler.scale(problem.loss()).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_perturbed(optimizer: llqr.Optimizer, problem: Problem, scaler: Scaler) -> None:
    optimizer.refresh_if_due(problem)
    if looks_ahead(optimizer):
        with optimizer.perturbed(scaler):
            scaler.scale(problem.loss()).backward()
    else:
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        if optimizer.needs_second_pass:
            with optimizer.perturbed(scaler):
                scaler.scale(problem.loss()).backward()
    scaler.step(optimizer)
    scaler.update()


SCALED_WAYS: dict[str, Callable[[llqr.Optimizer, Problem, Scaler], None]] = {
    "minimize": scaled_minimize,
    "passes": scaled_passes,
    "passes, step unscales": scaled_passes_without_unscale,
    "perturbed": scaled_perturbed,
}


# -- displacements ---------------------------------------------------------------------------------


def displacement(
    optimizer: llqr.Optimizer, problem: Problem, scale: float = 1.0
) -> dict[str, Tensor]:
    """eps of the coming step as {name: tensor}, read off the weights in the second pass."""
    start = weights(problem.model)
    for i in optimizer.passes():
        problem.backward(scale)
        if i:
            away = weights(problem.model)
    optimizer.zero_grad()
    return {n: away[n] - start[n] for n in start}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def shaped(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(vector, [t.numel() for t in like.values()])
    return {n: p.view_as(t) for p, (n, t) in zip(parts, like.items(), strict=True)}


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


# -- gradients that are not finite ----------------------------------------------------------------


def poisoned(problem: Problem, when: set[int], value: float = float("nan")) -> None:
    """Spoil the loss's gradient at the given calls from now (0 is the next)."""
    first = problem.calls
    forward = problem.model.forward

    def spoil(x: Tensor) -> Tensor:
        z = forward(x)
        # The factor is 1 in the forward and `value` in the backward: the loss itself stays finite.
        return Spoiled.apply(z, value) if problem.calls - 1 - first in when else z

    problem.model.forward = spoil


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: float) -> Tensor:
        ctx.value = value
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        g = g.clone()
        g.view(-1)[0] = ctx.value
        return g, None


# -- comparing -----------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.detach().clone() for n, b in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()
    }


def same(a: Any, b: Any, where: str = "") -> None:
    """Assert that two nested structures are equal bit for bit, types and keys included."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(a, b), f"{where}: differs by {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert type(a) is type(b) and (a == b or (a != a and b != b)), f"{where}: {a!r} != {b!r}"


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Assert that tensors agree to a relative error (of the largest entry)."""
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=tolerance * max(1.0, float(b[name].abs().max()))
        )


def everything(optimizer: llqr.Optimizer) -> dict[str, Any]:
    """A deep copy of weights, buffers and the whole optimizer state, wall times left out."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("llqr.report.seconds", None)
    return {"model": copy.deepcopy(optimizer.model.state_dict()), "optimizer": state}


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load as a checkpoint is, with nothing but weights allowed in."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- errors ----------------------------------------------------------------------------------------


def says(error: Any, *parts: str) -> Any:
    """Expect an error whose message holds all the parts."""
    pattern = "".join(f"(?=[\\s\\S]*{part})" for part in parts)
    return pytest.raises(error, match=pattern)


@contextmanager
def refused(optimizer: llqr.Optimizer, error: Any, *parts: str) -> Iterator[None]:
    """Expect the error; weights, buffers and the whole state are as before, training goes on."""
    before, grad_mode = everything(optimizer), torch.is_grad_enabled()
    with says(error, *parts):
        yield
    same(everything(optimizer), before)
    assert torch.is_grad_enabled() is grad_mode
    assert all(module.training for module in optimizer.model.modules())
