"""Which closed form stands for a structure."""

from __future__ import annotations

from .._base import Structure
from .._dense import Dense
from .._diag_kfac import DiagKfac
from .._diagonal import Diagonal, Vector
from .._e_kfac import EKfac
from .._identity import Identity
from .._kfac import Kfac
from .._scalar import Scalar
from ._base import ClosedForm
from ._dense import DenseMoments
from ._diag_kfac import DiagKfacMoments
from ._eigenbases import EKfacMoments, KfacMoments
from ._elementwise import DiagonalMoments, ScalarMoments
from ._identity import IdentityMoments

__all__ = ["CLOSED_FORMS", "closed_form_of"]

#: A closed form of a structure that has a name is entered here.
CLOSED_FORMS: dict[type[Structure], type[ClosedForm]] = {
    Identity: IdentityMoments,
    Scalar: ScalarMoments,
    Diagonal: DiagonalMoments,
    Vector: DiagonalMoments,
    DiagKfac: DiagKfacMoments,
    Kfac: KfacMoments,
    EKfac: EKfacMoments,
    Dense: DenseMoments,
}


def closed_form_of(kind: type[Structure]) -> type[ClosedForm]:
    """Return the closed form of a structure; a class that is one stands for itself.

    Raises:
        ValueError: the structure has none.
    """
    if issubclass(kind, ClosedForm):
        return kind
    if kind in CLOSED_FORMS:
        return CLOSED_FORMS[kind]
    known = ", ".join(k.name for k in CLOSED_FORMS if k is not Vector)
    raise ValueError(
        f"structure: {kind.name!r} has no closed form; use one of {known}, or a subclass of "
        "llqr.geometry.structures.ClosedForm"
    )
