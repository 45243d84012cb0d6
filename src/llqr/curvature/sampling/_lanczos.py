"""Any other H: its square root on a vector by Lanczos, from products with H."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._base import IndefiniteHessian

__all__ = ["lanczos_square_root"]


def lanczos_square_root(
    product: Callable[[Tensor], Tensor],
    e: Tensor,
    eps: float,
    tolerance: float = 1e-3,
    most: int = 100,
) -> Tensor:
    r"""Return :math:`H^{1/2} e` from an orthonormal basis Q of the Krylov space of e.

    .. math:: H^{1/2} e \approx |e| \, Q \, T^{1/2} e_1, \qquad T = Q^\top H Q

    (Higham, Functions of Matrices, 2008, section 13.2.) What k products give is as near as the
    best polynomial of degree k - 1 for the square root, whose error falls as 1 / k where H is
    singular; as a covariance it errs by its square: by .0005 of the largest eigenvalue at k = 13,
    and by 1e-5 at the most that are taken.

    Args:
        product: v -> H v.
        e: (n,), in the precision that sums are to be taken in.
        eps: the relative rounding error of a product.
        tolerance: relative change of the result at which it is done.
        most: products at most.

    Raises:
        IndefiniteHessian: an eigenvalue of T, and so one of H, is negative.
    """
    length = e.norm()
    basis = [e / length]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    before = torch.zeros(0, dtype=e.dtype, device=e.device)
    for _k in range(1, min(most, e.numel()) + 1):
        image = product(basis[-1])
        diagonal.append(basis[-1] @ image)
        # Twice: once leaves what rounding left of the first.
        Q = torch.stack(basis, 1)
        for _ in range(2):
            image = image - Q @ (Q.T @ image)
        T = torch.diag(torch.stack(diagonal))
        if beside:
            T = T + torch.diag(torch.stack(beside), 1) + torch.diag(torch.stack(beside), -1)
        values, vectors = torch.linalg.eigh(T)
        if float(values[0]) < -(eps**0.5) * float(values.abs().max()):
            raise IndefiniteHessian(float(values[0]))
        root = vectors @ (values.clamp(min=0).sqrt() * vectors[0])
        # Q is orthonormal: the change of Q root is that of root.
        change = (root - torch.nn.functional.pad(before, (0, 1))).norm()
        rest = image.norm()
        if change <= tolerance * root.norm() or rest <= eps * values.abs().max():
            break
        beside.append(rest)
        basis.append(image / rest)
        before = root
    result: Tensor = length * (Q @ root)
    return result
