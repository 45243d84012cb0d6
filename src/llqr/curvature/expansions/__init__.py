"""The ways of expanding the loss of one forward to second order, one class per way."""

from ._base import Expansion as Expansion
from ._missing_derivative import MissingDerivative as MissingDerivative
from ._missing_derivative import missing_derivative_in as missing_derivative_in
from ._output_hessian import LinearLoss as LinearLoss
from ._table import ways_of_expanding as ways_of_expanding
