"""Refreshes beside other threads: nothing that belongs to the process changes, not even for long.

A bystander looks at torch's switches while the forward of a refresh stands still.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llqr
from explicit import F64, agree, gauss_newton, vector
from llqr.curvature import _twice_differentiable as twice
from products import curvature_matrix
from replaced import Heads, Net, ready


def switches() -> list[Any]:
    """What a refresh once changed for the whole process."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    return [
        torch.amp.autocast_mode.autocast.__enter__,
        hooks.__enter__,
        hooks.__exit__,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
    ]


def in_another_thread(look: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_a_bystander_notices_nothing(curvature: str):
    net, x, y = (
        nn.Sequential(encoder(), nn.Linear(4, 3)),
        torch.randn(2, 3, 4),
        torch.tensor([0, 1]),
    )
    seen: list[Any] = []

    def look() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            cast = F.linear(x, net[1].weight).dtype
        fast, query = encoder().eval(), torch.randn(2, 3, 4)
        with torch.no_grad(), torch.profiler.profile() as profile:
            fast(query)
        names = {event.name for event in profile.events()}
        return [*switches(), cast, "aten::_transformer_encoder_layer_fwd" in names]

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x).mean(1)
        seen.append(in_another_thread(look))
        return F.cross_entropy(z, y), z

    before = in_another_thread(look)
    assert before[-2:] == [torch.bfloat16, True]
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    geometry = llqr.LLQR("diagonal", curvature=curvature, steps=2)
    llqr.Optimizer(base, net, geometry=geometry).refresh(forward)
    assert seen and all(s == before for s in seen)
    assert in_another_thread(look) == before


def test_refreshes_that_overlap_leave_everything_as_it_was():
    """One begins first, the other ends first: neither restores what the other had set."""
    both, go = threading.Barrier(2), threading.Event()
    before = switches()
    errors: list[BaseException] = []

    def train(first: bool) -> None:
        net, x = nn.Linear(4, 3), torch.ones(2, 4)
        calls: list[int] = []

        def forward() -> tuple[Tensor, Tensor]:
            if not calls:
                both.wait(60)
                if first:
                    go.wait(60)
            calls.append(1)
            with torch.autocast("cpu", torch.bfloat16):
                z = net(x)
            assert z.dtype == torch.float32  # overruled, in each thread
            return F.cross_entropy(z, torch.tensor([0, 1])), z

        try:
            base = torch.optim.SGD(net.parameters(), lr=0.1)
            optimizer = llqr.Optimizer(base, net, geometry=llqr.LLQR("diagonal", lr=1e-2))
            optimizer._refresher._warn_of_autocast = lambda: None
            optimizer.refresh(forward)
        except BaseException as error:
            errors.append(error)
        finally:
            if not first:
                go.set()

    threads = [threading.Thread(target=train, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and switches() == before
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == torch.bfloat16


def test_a_failed_refresh_leaves_everything_as_it_was():
    net, before = nn.Linear(4, 3), switches()

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            net(torch.ones(2, 4))
            raise RuntimeError("on purpose")

    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = llqr.Optimizer(base, net, geometry=llqr.LLQR("diagonal"))
    optimizer._refresher._warn_of_autocast = lambda: None
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.refresh(forward)
    assert switches() == before


@pytest.mark.parametrize("full", [False, True])
def test_compiled_code_of_a_bystander_stays_compiled(full: bool):
    """In the refresh the same module runs eagerly, before and after its graph was made."""
    runs: list[int] = []

    def backend(module: Any, _: Any) -> Any:
        return lambda *inputs: (runs.append(threading.get_ident()), module(*inputs))[1]

    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)
    compiled, x = torch.compile(net, backend=backend, fullgraph=full), torch.randn(6, 4, dtype=F64)
    here, graphs = threading.get_ident(), []

    def forward() -> tuple[Tensor, Tensor]:
        before = len(runs)
        z = compiled(x)
        assert len(runs) == before  # eager
        graphs.append(in_another_thread(lambda: (compiled(x), runs[-1])[1]))
        return z.square().mean(), z

    stance = torch._dynamo.eval_frame._stance
    for _ in range(2):
        llqr.quadratic_model(forward, net.parameters())
        compiled(x)
        assert runs[-1] == here  # after the refresh
    assert graphs and here not in graphs
    assert torch._dynamo.eval_frame._stance is stance
    torch.compiler.reset()


def test_attention_is_right_while_another_thread_chooses_kernels():
    net = ready(Net(Heads(), (2, 3, 6)))
    x, y = torch.randn(2, 3, 6, dtype=F64), torch.tensor([0, 2])
    parameters = list(net.parameters())
    end = threading.Event()

    def choose() -> None:
        while not end.is_set():
            for backend in SDPBackend.MATH, SDPBackend.FLASH_ATTENTION:
                with sdpa_kernel(backend):
                    pass

    def forward() -> tuple[Tensor, Tensor]:
        z = net(x)
        return F.cross_entropy(z, y), z

    with sdpa_kernel(SDPBackend.MATH):
        C = gauss_newton(net(x), lambda z: F.cross_entropy(z, y), parameters)
    thread = threading.Thread(target=choose)
    thread.start()
    try:
        agree(curvature_matrix(llqr.quadratic_model(forward, parameters), parameters), C)
    finally:
        end.set()
        thread.join()


# -- recurrent nets on cuDNN -----------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
def test_recurrent_nets_without_cudnn(kind: str, packed: bool, curvature: str, monkeypatch):
    """A stand-in for the device: every tensor counts as one that cuDNN would take."""
    options = {"nonlinearity": "relu"} if kind == "relu" else {}
    make = nn.RNN if kind == "relu" else getattr(nn, kind)
    net = make(3, 4, num_layers=2, bidirectional=True, batch_first=True, **options).to(F64)
    x: Any = torch.randn(3, 5, 3, dtype=F64)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2], batch_first=True)
    parameters, target = list(net.parameters()), torch.tensor([0, 3, 1])

    def forward() -> tuple[Tensor, Tensor]:
        out, last = net(x)
        z = last[0][0] if kind == "LSTM" else last[0]
        z = z + (out.data.sum(0)[:4] if packed else out.sum((0, 1))[:4])
        return F.cross_entropy(z, target), z

    d = [torch.randn_like(p) for p in parameters]
    plain = llqr.quadratic_model(forward, parameters, curvature)
    calls: list[Any] = []
    form = twice._elementary_form
    monkeypatch.setattr(twice, "_cudnn_takes", lambda t: True)
    monkeypatch.setattr(
        twice, "_elementary_form", lambda func, *rest: (calls.append(func), form(func, *rest))[1]
    )
    model = llqr.quadratic_model(forward, parameters, curvature)
    agree(vector(model.gradient), vector(plain.gradient))
    agree(vector(model.product(d)), vector(plain.product(d)))
    assert calls


def test_cudnn_takes_nothing_on_a_cpu():
    assert not twice._cudnn_takes(torch.ones(2))


# -- forward-mode differentiation, whose levels torch counts for the whole process -----------------


class OnceWithTangents(torch.autograd.Function):
    """The sine: once differentiable by backward, and by forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, d: Tensor) -> Tensor:
        return d * ctx.saved_tensors[0].cos()


def tangents_problem(seed: int) -> tuple[list[Tensor], Any, Tensor]:
    net = ready(nn.Linear(4, 3))
    x = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
    parameters = list(net.parameters())
    C = gauss_newton(net(x).sin(), lambda z: z.square().mean(), parameters)

    def forward() -> tuple[Tensor, Tensor]:
        z = OnceWithTangents.apply(net(x))
        return z.square().mean(), z

    return parameters, forward, C


@pytest.mark.filterwarnings("ignore:the forward uses OnceWithTangents:UserWarning")
def test_products_by_forward_mode_in_two_threads():
    problems, errors = [tangents_problem(seed) for seed in range(2)], []
    start = threading.Barrier(2)

    def work(parameters: list[Tensor], forward: Any, C: Tensor) -> None:
        try:
            model = llqr.quadratic_model(forward, parameters)
            start.wait(60)
            for _ in range(5):
                agree(curvature_matrix(model, parameters), C)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=p) for p in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_forward_mode_within_forward_mode_takes_differences():
    parameters, forward, _ = tangents_problem(0)

    def inner() -> tuple[Tensor, Tensor]:
        with torch.autograd.forward_ad.dual_level():
            return forward()

    d = [torch.ones_like(p) for p in parameters]
    model = llqr.quadratic_model(inner, parameters)
    with pytest.warns(UserWarning, match="OnceWithTangents.*central differences"):
        found = model.product(d)
    plain = llqr.quadratic_model(forward, parameters)
    with pytest.warns(UserWarning, match="OnceWithTangents.*forward-mode"):
        expected = plain.product(d)
    agree(vector(found), vector(expected), 1e-6)
