"""U: the inverse metric, its structures, and how it is learned."""

from ._base import FixedGeometry as FixedGeometry
from ._base import Geometry as Geometry
from ._llqr import LLQR as LLQR
from ._report import RefreshError as RefreshError
from ._report import RefreshReport as RefreshReport
