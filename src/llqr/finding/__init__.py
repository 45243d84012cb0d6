"""What to try: radii of the probe and inner learning rates, measured on a few batches."""

from ._inner_lr import InnerLRRow as InnerLRRow
from ._inner_lr import InnerLRTable as InnerLRTable
from ._inner_lr import find_inner_lr as find_inner_lr
from ._rho import RhoRow as RhoRow
from ._rho import RhoTable as RhoTable
from ._rho import find_rho as find_rho
