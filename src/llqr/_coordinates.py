"""The coordinates that the base steps in: the parameters' own, or those of U's bases."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._autocast import without_autocast
from ._joined_bases import JoinedBases
from ._parameters import NamedParameters
from ._vectors import Tensors, copies_of, widen_to_float32
from .geometry import Geometry
from .geometry._bases import Bases
from .perturbations import Perturbation

__all__ = ["Coordinates", "check_bases"]

#: What torch's optimizers and their relatives call a mean of gradients. RMSprop's ``grad_avg``
#: stays: its square is subtracted from second moments, which stay.
MEANS = ("exp_avg", "exp_avg_slow", "momentum_buffer")


def check_bases(
    base: torch.optim.Optimizer,
    geometry: Geometry | None,
    perturbation: Perturbation | None,
    graft: Any,
    named: Tensors,
) -> None:
    """Refuse what does not go with a base that steps in the bases of U."""
    rule = "transport: 'bases' "
    if geometry is None or geometry.bases_for(named) is None:
        raise ValueError(
            f"{rule}needs a geometry that has bases, such as NaturalGradient('e-kfac'), "
            f"got geometry={geometry!r}"
        )
    if geometry.sharded:
        raise ValueError(
            f"{rule}needs whole gradients and U in every process; with fully_shard or shard=True "
            "use transport=True"
        )
    if graft:
        raise ValueError(
            f"{rule}leaves the length of a step to the base, so there is nothing to graft; "
            f"leave graft=False, got {graft!r}"
        )
    if perturbation is not None and perturbation.looks_ahead:
        raise ValueError(
            f"{rule}keeps the base's momentum in other coordinates than "
            f"{type(perturbation).__name__} probes in; use llqr.SAM or transport=True"
        )
    for one in base.optimizers if isinstance(base, JoinedBases) else [base]:
        if isinstance(one, torch.optim.ASGD) or callable(getattr(one, "eval", None)):
            raise ValueError(
                f"{rule}does not go with {type(one).__name__}, which keeps an average of the "
                "weights; use torch.optim.AdamW"
            )


class Coordinates:
    r"""Let the base step in the coordinates of U's bases (SOAP's way, with the bases of U).

    .. math:: \tilde w = Q^\top w, \qquad \tilde g = Q^\top g, \qquad
        w \leftarrow w + Q\,(\tilde w^+ - \tilde w)

    where :math:`\tilde w^+` is where the base steps to. What the base keeps for each parameter is
    in these coordinates, too. Means of gradients turn with them; second moments stay as they are,
    as in SOAP: turned as the diagonal of a matrix they trained worse on all of three problems.

    Args:
        parameters: of the base.

    Attributes:
        bases: that the base's state is in; None: the parameters' own coordinates.

    Source: N. Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, ICLR 2025, section
    4, for the bases of a mean of gradients.
    """

    def __init__(self, parameters: NamedParameters) -> None:
        self._parameters = parameters
        self.bases: Bases | None = None

    def change_to(self, bases: Bases | None) -> None:
        """Turn the base's state to other bases; None: to the parameters' own coordinates."""
        old, self.bases = self.bases, bases
        if old is bases or (old is not None and (old.equals(bases) or old.goes_on_as(bases))):
            return
        with without_autocast(*self._parameters.devices):
            for means in self._means():
                turned = widen_to_float32(means)
                if old is not None:  # of another device, if the model moved since
                    turned = old.on(self._parameters.device).rotate_back(turned)
                if bases is not None:
                    turned = bases.rotate(turned)
                for name, mean in means.items():
                    mean.copy_(turned[name])

    def _means(self) -> Iterator[dict[str, Tensor]]:
        """Yield each kind of mean that the base keeps: {name of the parameter: tensor}."""
        state, named = self._parameters.base.state, self._parameters.named
        for key in MEANS:
            kept = {n: state[p][key] for n, p in named.items() if p in state and key in state[p]}
            # Some keep less than a whole tensor, or None until the first step.
            yield {
                name: mean
                for name, mean in kept.items()
                if isinstance(mean, Tensor) and mean.shape == named[name].shape
            }

    def rotate(self, gradients: Tensors) -> dict[str, Tensor]:
        """Return Q'g, each in its gradient's dtype; there are bases."""
        assert self.bases is not None
        with without_autocast(*self._parameters.devices):
            rotated = self.bases.rotate(gradients)
        return {name: x.to(gradients[name].dtype) for name, x in rotated.items()}

    @contextmanager
    def entered(self, names: Collection[str]) -> Iterator[None]:
        """Have the weights in the coordinates; behind, move them by what they moved there.

        Args:
            names: of the parameters that the base steps.
        """
        if self.bases is None:
            yield
            return
        named = self._parameters.named
        kept = [name for name in names if name in self.bases.names]
        weights = [named[name].detach() for name in kept]
        before = copies_of(weights)
        rotated = self.rotate(dict(zip(kept, before, strict=True)))
        begin = [rotated[name] for name in kept]
        try:
            torch._foreach_copy_(weights, begin)
            yield
            change = torch._foreach_sub(weights, begin)
        finally:
            torch._foreach_copy_(weights, before)
        with without_autocast(*self._parameters.devices):
            moved = self.bases.rotate_back(dict(zip(kept, change, strict=True)))
        for name, weight in zip(kept, weights, strict=True):
            weight.add_(moved[name])
