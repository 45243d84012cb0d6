"""One Gauss-Newton product three ways: ours, torch.func's jvp and vjp, curvlinops' operator.

All on the same network, batch and direction, in training steps; "error" is the relative distance
to ours. curvlinops is measured where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import PROBLEMS, Classifier, Clock, arguments, problem, show
from torch import Tensor
from torch.nn import functional as F

import llqr
from llqr.curvature import twice_differentiable


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, models=PROBLEMS)
    parser.add_argument("--training", action="store_true", help="batch norm sees the batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [r for name in options.models for r in compare(name, options)]
    show("One Gauss-Newton product, in steps", rows, options)


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the ways in turns."""
    p, clock = problem(name, options.device), Clock(options.device)
    p.model.train(options.training)
    named = {n: q for n, q in p.model.named_parameters() if q.requires_grad}
    model = llqr.quadratic_model(p, list(named.values()))
    d = [torch.randn_like(q) for q in named.values()]
    ours = torch.cat([v.reshape(-1) for v in model.product(d)])
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "llqr": lambda: model.product(d),
        "torch.func": functional(p, named, d),
    }
    operator = of_curvlinops(p, named, d)
    if operator is not None:
        ways["curvlinops"] = operator
    times, errors, missing = {"step": p.step}, {}, {}
    for way, call in ways.items():
        try:
            found = torch.cat([v.reshape(-1) for v in call()])
        except (RuntimeError, NotImplementedError) as error:
            missing[way] = str(error).partition("\n")[0][:60]
            continue
        errors[way] = float((found - ours).norm() / ours.norm())
        times[way] = call
    medians = clock.medians(times, options.repeats)
    return [
        {
            "model": f"{name} B{len(p.x)}",
            "way": way,
            "product": medians[way] / medians["step"] if way in medians else "",
            "error": errors.get(way, ""),
            "note": missing.get(way, ""),
        }
        for way in ways
    ]


def loss_of(p: Classifier, z: Tensor) -> Tensor:
    """The loss of the batch from its outputs."""
    return F.cross_entropy(z.flatten(0, -2), p.y.flatten())


def functional(
    p: Classifier, named: dict[str, Tensor], d: list[Tensor]
) -> Callable[[], list[Tensor]]:
    """The forward again for every product: J d with jvp, H with jvp of grad, J' with vjp."""
    values = {n: q.detach() for n, q in named.items()}
    tangents = dict(zip(named, d, strict=True))

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(p.model, parameters, (p.x,))

    def call() -> list[Tensor]:
        with twice_differentiable():  # math attention: the fast kernels have no forward mode
            z, zd = torch.func.jvp(outputs, (values,), (tangents,))
            gradient = torch.func.grad(lambda z: loss_of(p, z))
            _, hz = torch.func.jvp(gradient, (z,), (zd,))
            _, pull = torch.func.vjp(outputs, values)
            return list(pull(hz)[0].values())

    return call


def of_curvlinops(
    p: Classifier, named: dict[str, Tensor], d: list[Tensor]
) -> Callable[[], list[Tensor]] | None:
    """Return the product of curvlinops, if it is installed."""
    try:
        from curvlinops import GGNLinearOperator
    except ImportError:
        return None
    data = [(p.x, p.y)]
    operator = GGNLinearOperator(
        p.model, torch.nn.CrossEntropyLoss(), list(named.values()), data, check_deterministic=False
    )
    return lambda: operator @ d


if __name__ == "__main__":
    main()
