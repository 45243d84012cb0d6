"""Where the loss is probed: SAM and its relatives, one file each.

A perturbation turns gradients into a displacement eps of the parameters. It knows the metric only
as a function g -> U g, and no optimizer or module. To add one, subclass
:class:`llqr.Perturbation` and say where it probes (``displacement``); a method that also changes
the gradient of the step says how in ``combine``, and in ``adjust`` for steps without a second pass.
:func:`total_inner_product` is right for sharded gradients too.
"""

from .._vectors import total_inner_product as total_inner_product
from ._asam import ASAM as ASAM
from ._base import Perturbation as Perturbation
from ._base import Probe as Probe
from ._esam import ESAM as ESAM
from ._fisher_sam import FisherSAM as FisherSAM
from ._friendly_sam import FriendlySAM as FriendlySAM
from ._gsam import GSAM as GSAM
from ._look_sam import LookSAM as LookSAM
from ._msam import MSAM as MSAM
from ._sam import SAM as SAM
from ._wsam import WSAM as WSAM
