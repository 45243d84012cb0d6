"""In which order the ways of differentiating are tried."""

from __future__ import annotations

from .._curvatures import Curvature
from ._base import Expansion
from ._gauss_newton import (
    GaussNewtonByDifferences,
    GaussNewtonByDoubleBackward,
    GaussNewtonByForwardMode,
    GaussNewtonByReplacedOperations,
)
from ._newton import NewtonByDifferences, NewtonByDoubleBackward

__all__ = ["GAUSS_NEWTON_WAYS", "NEWTON_WAYS", "ways_of_expanding"]

#: For C = J' H J, the fastest first; the last one needs first derivatives only.
GAUSS_NEWTON_WAYS: tuple[type[Expansion], ...] = (
    GaussNewtonByReplacedOperations,
    GaussNewtonByDoubleBackward,
    GaussNewtonByForwardMode,
    GaussNewtonByDifferences,
)

#: For the Hessian, for which replaced operations are wrong. Forward mode over a backward pass is
#: left out: a product would take more than 3 training steps, by differences it takes about 2.
NEWTON_WAYS: tuple[type[Expansion], ...] = (NewtonByDoubleBackward, NewtonByDifferences)


def ways_of_expanding(curvature: Curvature) -> tuple[type[Expansion], ...]:
    """Return the ways for a curvature, in order of preference."""
    return GAUSS_NEWTON_WAYS if curvature.gauss_newton else NEWTON_WAYS
