"""llqr: geometry-aware, sharpness-aware training for PyTorch.

Learn a structured inverse preconditioner U from the layerwise LQR objective, probe the loss in its
metric, and transport the update by it, around any torch.optim optimizer.
"""

import importlib as _importlib
import typing as _typing

# Which pass of a step is running
from ._current_pass import current_pass as current_pass

# The exact step of a chain of layers
from ._exact_lqr import exact_lqr_step as exact_lqr_step

# The optimizer
from ._optimizer import Optimizer as Optimizer

# What the curvature is
from .curvature import Curvature as Curvature
from .curvature import Divergence as Divergence
from .curvature import Fisher as Fisher
from .curvature import Newton as Newton
from .curvature import QuadraticModel as QuadraticModel
from .curvature import quadratic_model as quadratic_model

# The metric U
from .geometry import LLQR as LLQR
from .geometry import FixedGeometry as FixedGeometry
from .geometry import Geometry as Geometry
from .geometry import GradientMoments as GradientMoments
from .geometry import NaturalGradient as NaturalGradient
from .geometry import RefreshError as RefreshError
from .geometry import RefreshReport as RefreshReport
from .geometry import StructuredGeometry as StructuredGeometry
from .geometry import growing as growing

# Where the loss is probed
from .perturbations import ASAM as ASAM
from .perturbations import ESAM as ESAM
from .perturbations import GSAM as GSAM
from .perturbations import MSAM as MSAM
from .perturbations import SAM as SAM
from .perturbations import WSAM as WSAM
from .perturbations import FisherSAM as FisherSAM
from .perturbations import FriendlySAM as FriendlySAM
from .perturbations import LookSAM as LookSAM
from .perturbations import Perturbation as Perturbation
from .perturbations import Probe as Probe

if _typing.TYPE_CHECKING:
    # Seeing the sharpness: eigenvalues, trace, density, rises and slices of the loss
    from . import finding as finding
    from . import sharpness as sharpness

    # What to try
    from .finding import find_inner_lr as find_inner_lr
    from .finding import find_rho as find_rho

__version__ = "0.2.0"

#: Where a tool is that a training does not need: it is imported when it is asked for.
_TOOLS = {
    "finding": "finding",
    "sharpness": "sharpness",
    "find_inner_lr": "finding",
    "find_rho": "finding",
}


def __getattr__(name: str) -> _typing.Any:
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _importlib.import_module(f".{_TOOLS[name]}", __name__)
    return module if name == _TOOLS[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS})
