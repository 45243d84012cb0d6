"""What a device does in a second, measured or given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from .work import Work, measure_work

__all__ = ["Rates", "measure_rates"]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        flops: floating-point operations in products.
        memory: bytes that elementwise operations read and write.
        network: bytes that a process sends to others.
        call: seconds of an operation with nothing to compute.
        convolution: speed of convolutions, as a part of ``flops``.
        factorisation: speed of QR and Cholesky factorisations, as a part of ``flops``.
        functions: speed of exponentials and the like, in bytes as a part of ``memory``.
        float32: speed of U's products, which are in float32, as a part of ``flops``.
    """

    flops: float
    memory: float
    network: float = 25e9
    call: float = 5e-6
    convolution: float = 1.0
    factorisation: float = 0.05
    functions: float = 1.0
    float32: float = 1.0

    def seconds(self, work: Work) -> float:
        """Return how long some work takes: operations, traffic and calls, one after the other."""
        operations = work.flops + work.convolved / self.convolution
        operations += work.factored / self.factorisation
        moved = work.moved + work.evaluated / self.functions
        return operations / self.flops + moved / self.memory + work.calls * self.call

    @property
    def of_algebra(self) -> Rates:
        """The rates of what is computed in float32, whatever the dtype of the network."""
        return replace(self, flops=self.flops * self.float32, float32=1.0)


def measure_rates(device: str = "cpu", network: float = 25e9) -> Rates:
    """Measure products, convolutions, factorisations, elementwise sums and small calls here."""
    n, channels, side = 512, 64, 16
    a, b = torch.randn(2, n, n, device=device)
    # More than caches hold, as the vectors of a refresh are.
    vectors = torch.ones(8, 2, 2**21, device=device)
    images = torch.randn(8, channels, side, side, device=device, requires_grad=True)
    kernel = torch.randn(channels, channels, 3, 3, device=device, requires_grad=True)
    square = a[: n // 2, : n // 2].contiguous()

    wide = torch.randn(8, 2**18, device=device, requires_grad=True)

    def add() -> None:
        for x, y in vectors:
            torch.add(x, y)

    def evaluate() -> None:
        wide.grad = None
        F.gelu(wide).backward(wide.detach())

    def convolve() -> None:
        F.conv2d(images, kernel, padding=1).sum().backward()

    flops = 2 * n**3 / _median(lambda: torch.mm(a, b), device)
    stream = 3 / 2 * vectors.nbytes / _median(add, device)
    # Its argument and its value, and those with two gradients backward.
    evaluated = 5 * wide.nbytes / _median(evaluate, device)
    # Forward, and two products backward; Q and R.
    convolved = 3 * 2 * 9 * images.numel() * channels / _median(convolve, device)
    factored = 8 / 3 * len(square) ** 3 / _median(lambda: torch.linalg.qr(square), device)
    call = _measure_call(device)
    return Rates(
        flops,
        stream,
        network,
        call,
        convolved / flops,
        factored / flops,
        evaluated / stream,
    )


def _measure_call(device: str) -> float:
    """Return the seconds of a call, in a network in which there is nothing to compute."""
    with torch.device(device):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
        x = torch.ones(2, 4)
    parameters = list(model.parameters())

    def twice() -> None:
        loss = model(x).square().sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients])

    calls = measure_work(twice).calls
    return _median(twice, device, times=20) / calls


def _median(compute: Callable[[], object], device: str, times: int = 7) -> float:
    def wait() -> None:
        if device != "cpu":
            getattr(torch, device).synchronize()

    # Others on the machine disturb the time of a processor less than that of the wall.
    alone = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    compute()
    found = []
    for _ in range(times):
        wait()
        began = now()
        compute()
        wait()
        found.append(now() - began)
    return statistics.median(found)
