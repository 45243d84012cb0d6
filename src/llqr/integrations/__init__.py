"""Training loops that are not the user's own: one file a framework, imported by its users alone.

Beside them, what all loops can use: the numbers of refreshes and of sharpness for a logger.
"""

from ._logs import log_refreshes as log_refreshes
from ._logs import numbers_of as numbers_of
from ._logs import tensorboard as tensorboard
