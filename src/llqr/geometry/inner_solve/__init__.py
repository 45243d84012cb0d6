"""The inner solve of LLQR: a few steps on J(U), equation (9), in four ways that agree.

The literal loop is the ground truth. The buffered loop makes the same steps faster, the reduced one
runs on coefficients if U is linear in its state, and recycled products answer a product from
earlier ones. Vectors here are flat; nothing knows a module, a parameter or a process.
"""

from ..._allocations import Allocations as Allocations
from ..._allocations import bytes_of as bytes_of
from ._buffered import solve_in_buffers as solve_in_buffers
from ._flat_model import FlatModel as FlatModel
from ._flat_model import pack_mean as pack_mean
from ._learner import Learner as Learner
from ._learner import Outcome as Outcome
from ._memory import RefreshMemory as RefreshMemory
from ._objective import Objective as Objective
from ._own_units import in_own_units as in_own_units
from ._own_units import inner_rates as inner_rates
from ._recycled_product import RecycledProduct as RecycledProduct
from ._solve import basis_capacity as basis_capacity
from ._solve import runs_on_coefficients as runs_on_coefficients
from ._solve import solve_inner_problem as solve_inner_problem
from ._solvers import InnerSolver as InnerSolver
from ._solvers import SolverFactory as SolverFactory
from ._solvers import SolverName as SolverName
from ._solvers import SolverOptions as SolverOptions
from ._solvers import find_solver as find_solver
