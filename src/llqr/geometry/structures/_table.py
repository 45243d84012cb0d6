"""The structures that have a name, and how a setting becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from ._base import Structure
from ._dense import Dense
from ._diag_kfac import DiagKfac
from ._diagonal import Diagonal
from ._e_kfac import EKfac
from ._identity import Identity
from ._kfac import Kfac
from ._scalar import Scalar
from ._verify import verify_structure

__all__ = ["STRUCTURES", "StructureName", "StructureOf", "check_structure", "find_structure"]

StructureName = Literal["identity", "scalar", "diagonal", "diag-kfac", "kfac", "e-kfac", "dense"]
#: A structure's name or class, or a function (name, parameter) -> name or class.
StructureOf = StructureName | type[Structure] | Callable[[str, Tensor], str | type[Structure]]

#: A new structure is entered here (and its name above, for type checkers).
STRUCTURES: dict[str, type[Structure]] = {
    kind.name: kind for kind in (Identity, Scalar, Diagonal, DiagKfac, Kfac, EKfac, Dense)
}
assert set(STRUCTURES) == set(get_args(StructureName))

_verified: set[type[Structure]] = set(STRUCTURES.values())


def check_structure(structure: Any) -> None:
    """Refuse what is neither a structure's name, a class, nor a function; verify a new class."""
    if isinstance(structure, type) and issubclass(structure, Structure):
        _verify_once(structure)
    elif not callable(structure) and structure not in list(STRUCTURES):
        raise ValueError(
            f"structure: expected one of {', '.join(STRUCTURES)}, a Structure class or a callable "
            f"(name, parameter) -> name, got {structure!r}"
        )


def find_structure(structure: StructureOf, name: str, parameter: Tensor) -> type[Structure]:
    """Return the structure of a parameter.

    Raises:
        ValueError: the name is not known, or a class is wrong (see :func:`verify_structure`).
    """
    chosen: Any = structure
    if callable(structure) and not isinstance(structure, type):
        chosen = structure(name, parameter)
    if isinstance(chosen, type) and issubclass(chosen, Structure):
        _verify_once(chosen)
        return chosen
    if chosen not in list(STRUCTURES):
        raise ValueError(
            f"structure: expected one of {', '.join(STRUCTURES)}, got {chosen!r} "
            f"for parameter {name!r}"
        )
    return STRUCTURES[chosen]


def _verify_once(kind: type[Structure]) -> None:
    """Check a class that is not in the table, the first time it is met."""
    if kind not in _verified:
        verify_structure(kind)
        _verified.add(kind)
