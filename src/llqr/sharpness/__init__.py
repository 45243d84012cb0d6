"""Seeing the sharpness: eigenvalues, trace, density, rises of the loss, and slices of it."""

from ._density import Density as Density
from ._density import density as density
from ._eigenvalues import Eigenvalues as Eigenvalues
from ._eigenvalues import eigenvalues as eigenvalues
from ._landscape import Landscape as Landscape
from ._landscape import landscape as landscape
from ._m_sharpness import MSharpness as MSharpness
from ._m_sharpness import m_sharpness as m_sharpness
from ._measurement import Measurement as Measurement
from ._trace import Trace as Trace
from ._trace import trace as trace
from ._worst_case import WorstCase as WorstCase
from ._worst_case import worst_case as worst_case
