"""From parameters to layers, matrix views, blocks, shards and one flat vector.

Only :class:`Layout` knows names, blocks and shards. Everything behind it (structures, inner solve)
sees flat vectors and groups of equal blocks. A layout knows no structure of U by name: it asks a
:class:`BlockKind` how a layer is cut and whether a block may be sharded entry by entry.
"""

from ._blocks import Block as Block
from ._blocks import BlockKind as BlockKind
from ._blocks import Group as Group
from ._blocks import Slice as Slice
from ._flat_space import FlatSpace as FlatSpace
from ._layout import Layout as Layout
from ._modules import layers_of as layers_of
from ._modules import matrix_shape as matrix_shape
from ._modules import unwrap_model as unwrap_model
