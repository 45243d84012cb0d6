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
            f"{rule}needs bases of U, which matrices have in a geometry such as "
            f"NaturalGradient('e-kfac'); geometry={geometry!r} has none for the {len(named)} "
            "parameters of the base"
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
    in these coordinates, too. Means of gradients turn with them; second moments stay with their
    columns of Q, as in SOAP: turned as the diagonal of a matrix they trained worse on all of three
    problems.

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
        old = self.bases
        if old is not bases and not (old is not None and old.equals(bases)):
            self._turn(self._parameters.named, old, bases)
        self.bases = bases

    def leave(self, before: Tensors) -> None:
        """Take the base's state to the parameters' own coordinates, as these have changed.

        The bases are those of tensors by name and shape. Behind this, names may mean others.

        Args:
            before: the parameters by name, as they were until now.
        """
        if self.bases is not None:
            self._turn(self._holders(before), self.bases, None)
            self.bases = None

    def _holders(self, before: Tensors) -> dict[str, Tensor]:
        """Return where the state of each former parameter is now: {former name: tensor}.

        A state may have been carried to the tensor that took a parameter's place.
        """
        state, now = self._parameters.base.state, self._parameters.named
        known = set(map(id, before.values()))
        holders = dict(before)
        for name, old in before.items():
            new = now.get(name, old)
            if old not in state and new in state and id(new) not in known:
                holders[name] = new
        return holders

    def _turn(self, holders: Tensors, old: Bases | None, new: Bases | None) -> None:
        """Turn the means from bases to others: all of them, or none if that fails."""
        turned: list[tuple[Tensor, Tensor]] = []
        with without_autocast(*self._parameters.devices):
            for means in self._means(holders):
                x = widen_to_float32(means)
                if old is not None:  # of another device, if the model moved since
                    x = old.on(next(iter(x.values())).device).rotate_back(x)
                if new is not None:
                    x = new.rotate(x)
                turned += [(mean, x[name]) for name, mean in means.items()]
        for mean, value in turned:
            mean.copy_(value)

    def _means(self, holders: Tensors) -> Iterator[dict[str, Tensor]]:
        """Yield each kind of mean that the base keeps: {name of the parameter: tensor}."""
        state = self._parameters.base.state
        for key in MEANS:
            kept = {n: state[p][key] for n, p in holders.items() if p in state and key in state[p]}
            # Some keep less than a whole tensor, or None until the first step.
            whole = {
                name: mean
                for name, mean in kept.items()
                if isinstance(mean, Tensor) and mean.shape == holders[name].shape
            }
            if whole:
                yield whole

    def rotate(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return Q'x, each in its tensor's dtype; there are bases."""
        assert self.bases is not None
        with without_autocast(*self._parameters.devices):
            rotated = self.bases.rotate(tensors)
        return {name: x.to(tensors[name].dtype) for name, x in rotated.items()}

    def rotated_weights(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return Q'w of those of these parameters that have bases."""
        if self.bases is None:
            return {}
        kept, named = self.bases.names, self._parameters.named
        return self.rotate({name: named[name].detach() for name in names if name in kept})

    @contextmanager
    def entered(self, begin: Tensors) -> Iterator[None]:
        """Have the weights in the coordinates; behind, move them by what they moved there.

        Args:
            begin: what :meth:`rotated_weights` returned.
        """
        if not begin:
            yield
            return
        named, rotated = self._parameters.named, list(begin.values())

        def weights() -> list[Tensor]:  # found anew, since a base may give p.data other memory
            return [named[name].detach() for name in begin]

        before = copies_of(weights())
        try:
            torch._foreach_copy_(weights(), rotated)
            yield
            change = torch._foreach_sub(weights(), rotated)
        finally:
            torch._foreach_copy_(weights(), before)
        with without_autocast(*self._parameters.devices):
            assert self.bases is not None
            moved = self.bases.rotate_back(dict(zip(begin, change, strict=True)))
        for name, weight in zip(begin, weights(), strict=True):
            weight.add_(moved[name])
