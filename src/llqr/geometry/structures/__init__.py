"""The structures of U, one file each, and U as a whole.

A file holds all of one structure: its maths, its traits, and the fast inner step if it has one. To
add a structure, write one such file and enter its class in ``_table.py``; or pass the class itself
to ``llqr.LLQR(structure=...)``.
"""

from ._base import Bounds as Bounds
from ._base import State as State
from ._base import Structure as Structure
from ._block_diagonal import BlockDiagonal as BlockDiagonal
from ._block_diagonal import States as States
from ._diagonal import Vector as Vector
from ._eigenvalues import EXACT_BELOW as EXACT_BELOW
from ._eigenvalues import LANCZOS_STEPS as LANCZOS_STEPS
from ._eigenvalues import WITH_LAPACK as WITH_LAPACK
from ._inner_step import InnerStep as InnerStep
from ._table import STRUCTURES as STRUCTURES
from ._table import StructureName as StructureName
from ._table import StructureOf as StructureOf
from ._table import find_structure as find_structure
from ._verify import verify_structure as verify_structure
from .closed_form import Averaging as Averaging
from .closed_form import ClosedForm as ClosedForm
