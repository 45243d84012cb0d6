"""The coordinates that the base steps in: the parameters' own, or those of U's bases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._autocast import without_autocast
from ._joined_bases import optimizers_of
from ._parameters import NamedParameters
from ._vectors import Tensors, copies_of, widen_to_float32
from ._warnings import warn_caller
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
    for one in optimizers_of(base):
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
        #: Former parameters, and whether what the base keeps of them is in their own coordinates.
        self._left: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        self.assume(None)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_left"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has tensors of its own.
        self.__dict__.update(state, _left=WeakTensorKeyDictionary())

    def assume(self, bases: Bases | None) -> None:
        """Take the base's state for one in these bases."""
        self.bases = bases
        self._named = self._parameters.named  # that the bases were of, by name

    def change_to(self, bases: Bases | None) -> None:
        """Turn the base's state to other bases; None: to the parameters' own coordinates."""
        if self._named is not self._parameters.named:
            self._follow_parameters()
        old, resized = self.bases, set[str]()
        if old is not bases and not (old is not None and old.equals(bases)):
            resized = self._turn([self._parameters.named], old, bases)
        self.assume(bases)
        _warn_of_new_starts(resized)

    def _follow_parameters(self) -> None:
        """Take the state to the parameters' own coordinates, as names may mean others now."""
        state, now = self._parameters.base.state, self._parameters.named
        known = set(map(id, self._named.values()))
        arrived = {name: p for name, p in now.items() if id(p) not in known and p in state}
        back = {name: self._left[p] for name, p in arrived.items() if p in self._left}
        resized = set[str]()
        if self.bases is not None:
            # A tensor that is new took a parameter's place, and its state with it.
            carried = {n: p for n, p in arrived.items() if n in self._named and n not in back}
            resized = self._turn([self._named, carried], self.bases, None)
        # The bases of these are gone: their state was away when they turned.
        away = {name: arrived[name] for name, own in back.items() if not own}
        for mean in (x for means in self._means(away) for x in means.values()):
            mean.zero_()
        for name in back:
            del self._left[arrived[name]]
        present = set(map(id, now.values()))
        turned = self.bases.names if self.bases is not None else frozenset()
        for name, p in self._named.items():
            if id(p) not in present:
                self._left[p] = p in state or name not in turned
        self.assume(None)
        _warn_of_new_starts(resized, away)

    def _turn(self, holders: Iterable[Tensors], old: Bases | None, new: Bases | None) -> set[str]:
        """Turn the means from bases to others: all of them, or none if that fails.

        Args:
            holders: {name that the bases know: tensor whose state the base has}, several of them.
            old: that the means are in.
            new: that they go to.

        Returns:
            The names whose means start anew, since their shape is no longer that of the bases.
        """
        turned: list[tuple[Tensor, Tensor | None]] = []
        lost: set[str] = set()
        with without_autocast(*self._parameters.devices):
            for means in (found for named in holders for found in self._means(named)):
                fitting = {n: x for n, x in means.items() if old is None or old.fits(n, x)}
                values = widen_to_float32(fitting)
                if old is not None and values:  # of another device, if the model moved since
                    values = old.on(next(iter(values.values())).device).rotate_back(values)
                if new is not None:
                    values = new.rotate(values)
                turned += [(mean, values.get(name)) for name, mean in means.items()]
                lost |= means.keys() - fitting.keys()
        for mean, value in turned:
            mean.zero_() if value is None else mean.copy_(value)
        return lost

    def _means(self, holders: Tensors) -> Iterator[dict[str, Tensor]]:
        """Yield each kind of mean that the base keeps: {name of the parameter: tensor}."""
        state = self._parameters.base.state
        for key in MEANS:
            kept = {n: state[p][key] for n, p in holders.items() if p in state and key in state[p]}
            # Some keep less than a whole tensor, or None until the first step.
            yield {
                name: mean
                for name, mean in kept.items()
                if isinstance(mean, Tensor) and mean.shape == holders[name].shape
            }

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

        def find() -> list[Tensor]:  # anew behind the step, since a base may assign p.data
            return [named[name].detach() for name in begin]

        weights = find()
        before = copies_of(weights)
        try:
            torch._foreach_copy_(weights, rotated)
            yield
            change = torch._foreach_sub(find(), rotated)
        finally:
            weights = find()
            torch._foreach_copy_(weights, before)
        with without_autocast(*self._parameters.devices):
            assert self.bases is not None
            moved = self.bases.rotate_back(dict(zip(begin, change, strict=True)))
        for name, weight in zip(begin, weights, strict=True):
            weight.add_(moved[name])


def _warn_of_new_starts(resized: Collection[str], away: Collection[str] = ()) -> None:
    """Say whose means could not be turned; when all is done, as a warning may be an error."""
    if resized:
        warn_caller(
            f"the shape of {', '.join(map(repr, sorted(resized)))} changed, so what the base kept "
            "of its mean gradient, in the bases of U, starts anew at zero"
        )
    if away:
        warn_caller(
            f"the state of {', '.join(map(repr, away))} was away while the bases of U turned, so "
            "the base's mean of its gradients starts anew at zero; leave optimizer.state as it is "
            "when a parameter leaves for a while"
        )
