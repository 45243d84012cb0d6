"""The ways of expanding the loss of one forward to second order, one class per way."""

from ._base import Expansion as Expansion
from ._table import ways_of_expanding as ways_of_expanding
