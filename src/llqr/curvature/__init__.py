"""C: what the curvature of a loss is, and products with it."""

from ._curvatures import Curvature as Curvature
from ._curvatures import Divergence as Divergence
from ._curvatures import Fisher as Fisher
from ._curvatures import Newton as Newton
from ._curvatures import as_curvature as as_curvature
from ._forwards import count_nonzero_rows as count_nonzero_rows
from ._forwards import split_loss_and_outputs as split_loss_and_outputs
from ._output_hessian import LinearLoss as LinearLoss
from ._output_hessian import SaturatedLoss as SaturatedLoss
from ._quadratic_model import QuadraticModel as QuadraticModel
from ._quadratic_model import check_scale as check_scale
from ._quadratic_model import normalised_weights as normalised_weights
from ._quadratic_model import quadratic_model as quadratic_model
from ._rehearsal import RehearsedModel as RehearsedModel
from ._samples import CurvatureSamples as CurvatureSamples
from ._samples import curvature_samples as curvature_samples
from ._synchronised import is_synchronised as is_synchronised
from ._synchronised import synchronised_batch_norm as synchronised_batch_norm
from ._twice_differentiable import twice_differentiable as twice_differentiable
from .sampling import IndefiniteHessian as IndefiniteHessian
