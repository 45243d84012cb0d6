"""Structures whose best U follows from second moments of curvature samples, without a solve.

A file holds one kind. To give a structure of one's own a closed form, derive its class from
:class:`ClosedForm`; to give one that has a name, enter it in ``_table.py``.
"""

from ._base import Averaging as Averaging
from ._base import ClosedForm as ClosedForm
from ._one_sided import OneSided as OneSided
from ._table import CLOSED_FORMS as CLOSED_FORMS
from ._table import closed_form_of as closed_form_of
