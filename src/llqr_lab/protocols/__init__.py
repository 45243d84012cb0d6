"""Every hyperparameter of the paper's tables and figures, with where each value comes from."""

from .demo import DEMO_KEYS as DEMO_KEYS
from .demo import DEMO_METHODS as DEMO_METHODS
from .experiments import EXPERIMENTS as EXPERIMENTS
from .experiments import Experiment as Experiment
from .experiments import resolve_settings as resolve_settings
from .scales import SCALES as SCALES
from .settings import METHODS as METHODS
from .settings import Method as Method
from .settings import Setting as Setting
from .settings import Source as Source
from .settings import slug as slug

__all__ = [
    "DEMO_KEYS",
    "DEMO_METHODS",
    "EXPERIMENTS",
    "Experiment",
    "METHODS",
    "Method",
    "SCALES",
    "Setting",
    "Source",
    "resolve",
    "slug",
]
