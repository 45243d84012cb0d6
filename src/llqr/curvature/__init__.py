"""C: what the curvature of a loss is, and products with it."""

from ._curvatures import Curvature as Curvature
from ._curvatures import Divergence as Divergence
from ._curvatures import Fisher as Fisher
from ._curvatures import Newton as Newton
from ._curvatures import as_curvature as as_curvature
from ._exact_lqr import exact_lqr_step as exact_lqr_step
from ._quadratic_model import QuadraticModel as QuadraticModel
from ._quadratic_model import quadratic_model as quadratic_model
