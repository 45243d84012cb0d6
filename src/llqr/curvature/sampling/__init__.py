"""Square roots of H, the second derivative of the loss in the outputs: one class per kind of H."""

from ._base import IndefiniteHessian as IndefiniteHessian
from ._table import OutputSquareRoot as OutputSquareRoot
