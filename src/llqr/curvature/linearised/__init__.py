"""Operations with their two linear maps at fixed inputs, and the mode that puts them in place."""

from ._autograd import is_replaced as is_replaced
from ._base import has_subclass as has_subclass
from ._replaced_operations import ReplacedOperations as ReplacedOperations
from ._replaced_operations import replaced_above as replaced_above
