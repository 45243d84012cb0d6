"""Explicit matrices that the tests compare products, structures and solves with.

Nothing here uses the library: Jacobians row by row, C as a matrix, U as a matrix built from the
exported state and from rules of its own for matrix views and blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

F64 = torch.float64


# -- vectors ---------------------------------------------------------------------------------------


def vector(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def split(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors shaped like others."""
    parts = torch.split(v, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    """Assert equality to a tolerance relative to the largest entry of ``b``."""
    assert a.shape == b.shape and a.dtype == b.dtype
    error, size = float((a - b).abs().max()), float(b.abs().max())
    assert error <= tolerance * size, f"off by {error:.2e} at size {size:.2e}"


# -- C ---------------------------------------------------------------------------------------------


def rows(y: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The Jacobian of a vector in the parameters, one backward pass a row."""
    jacobian = []
    for entry in y.reshape(-1):
        grads = torch.autograd.grad(
            entry, parameters, retain_graph=True, materialize_grads=True, create_graph=create_graph
        )
        jacobian.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(jacobian)


def gauss_newton(
    outputs: Any, scalar: Callable[[Any], Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """J' H J, with H the second derivative of ``scalar`` in all tensors of ``outputs`` at once."""
    zs, spec = pytree.tree_flatten(outputs)
    J = rows(torch.cat([z.reshape(-1) for z in zs]), parameters)

    def of_vector(v: Tensor) -> Tensor:
        return scalar(pytree.tree_unflatten(split(v, zs), spec))

    H = torch.autograd.functional.hessian(of_vector, vector(zs))
    return J.T @ H @ J


def gradient_and_hessian(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """g and the Hessian, row by row."""
    grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    g = torch.cat([v.reshape(-1) for v in grads])
    return g.detach(), rows(g, parameters).detach()


# -- U ---------------------------------------------------------------------------------------------


def as_matrix(index: Tensor, transposed: bool = False) -> Tensor | None:
    """A parameter-shaped tensor as U sees it: a matrix, or None if it is elementwise."""
    if transposed:
        index = index.transpose(0, 1)
    while index.dim() > 2 and index.shape[0] == 1:
        index = index[0]
    return index.flatten(1) if index.dim() >= 2 else None


def chunks(size: int, width: int | None) -> list[slice]:
    width = size if width is None else width
    return [slice(i, min(i + width, size)) for i in range(0, size, width)]


def block_indices(
    model: nn.Module,
    structure: str | Callable[[str, Tensor], str],
    block_size: int | None = None,
) -> list[tuple[str, str, str, Tensor]]:
    """All blocks as (structure, first parameter, number there, indices into the flat parameters).

    The indices of a Kronecker block are a matrix, all others a vector.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    of = structure if callable(structure) else (lambda name, parameter: structure)
    turned = {
        f"{n}.weight".lstrip(".")
        for n, m in model.named_modules()
        if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    }
    ends = torch.tensor([p.numel() for p in named.values()]).cumsum(0).tolist()
    index = {
        n: torch.arange(end - p.numel(), end).view(p.shape)
        for end, (n, p) in zip(ends, named.items(), strict=True)
    }
    layers: dict[tuple[str, str], list[str]] = {}
    for n, p in named.items():
        layers.setdefault((n.rpartition(".")[0], of(n, p)), []).append(n)
    found = []
    for (_, kind), names in layers.items():
        if kind in ("identity", "scalar", "diagonal", "dense"):
            whole = torch.cat([index[n].reshape(-1) for n in names])
            owners = [n for n in names for _ in range(index[n].numel())]
            width = block_size if kind == "dense" else None
            numbers: dict[str, int] = {}
            for chunk in chunks(len(whole), width):
                owner = owners[chunk.start]
                numbers[owner] = numbers.get(owner, -1) + 1
                found.append((kind, owner, str(numbers[owner]), whole[chunk]))
            continue
        for n in names:
            matrix = as_matrix(index[n], n in turned)
            if matrix is None:
                found.append(("diagonal", n, "", index[n].reshape(-1)))
                continue
            cut = [
                matrix[r, c]
                for r in chunks(matrix.shape[0], block_size)
                for c in chunks(matrix.shape[1], block_size)
            ]
            found.extend((kind, n, str(i), block) for i, block in enumerate(cut))
    return found


def block_matrix(kind: str, entries: Mapping[str, Tensor], size: int) -> Tensor:
    """One block of U on row-major flattened X, differentiable in the entries."""
    if kind == "identity":
        return torch.eye(size, dtype=F64)
    if kind == "scalar":
        return entries["U"] * torch.eye(size, dtype=F64)
    if kind == "diagonal":
        return torch.diag(entries["U"])
    if kind == "dense":
        return entries["U"]
    if kind == "diag-kfac":  # vec(B X A') = (B kron A) vec(X) for row-major vec
        return torch.diag(torch.kron(entries["B"], entries["A"]))
    if kind == "kfac":
        return torch.kron(entries["B"].contiguous(), entries["A"].contiguous())
    assert kind == "e-kfac"
    Q = torch.kron(entries["QB"].contiguous(), entries["QA"].contiguous())
    return Q @ torch.diag(entries["S"].reshape(-1)) @ Q.T


def entries_of(
    state: Mapping[str, Mapping[str, Tensor]],
    block: tuple[str, str, str, Tensor],
    named: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The exported entries of one block."""
    kind, owner, number, index = block
    if kind == "identity":
        return {}
    if kind == "diagonal":  # exported with each parameter, in its shape
        whole = torch.cat(
            [state[n]["U"].reshape(-1) if "U" in state[n] else torch.full((p.numel(),), math.nan)
             for n, p in named.items()]
        )  # fmt: skip
        return {"U": whole[index]}
    tail = f".{number}"
    return {k[: -len(tail)]: v for k, v in state[owner].items() if k.endswith(tail)}


def explicit_U(
    model: nn.Module,
    structure: str | Callable[[str, Tensor], str],
    state: Mapping[str, Mapping[str, Tensor]],
    block_size: int | None = None,
    square: bool = False,
) -> Tensor:
    """U as one matrix in model order, from what ``geometry.state()`` exports."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    n = sum(p.numel() for p in named.values())
    U = torch.zeros(n, n, dtype=F64)
    for block in block_indices(model, structure, block_size):
        entries = {k: v.double() for k, v in entries_of(state, block, named).items()}
        if square and "S" in entries:
            entries["S"] = entries["S"].square() + 1e-12
        index = block[3].reshape(-1)
        U[index[:, None], index] = block_matrix(block[0], entries, len(index))
    return U
