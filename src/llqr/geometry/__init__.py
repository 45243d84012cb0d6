"""U: the inverse metric, its structures, and how it is learned."""

from ._base import Geometry as Geometry
from ._base import NormStatistics as NormStatistics
from ._fixed import FixedGeometry as FixedGeometry
from ._gradient_moments import GradientMoments as GradientMoments
from ._gradient_moments import GradientMomentsSettings as GradientMomentsSettings
from ._llqr import LLQR as LLQR
from ._llqr import LLQRSettings as LLQRSettings
from ._metric_settings import Learned as Learned
from ._metric_settings import MetricSettings as MetricSettings
from ._natural_gradient import NaturalGradient as NaturalGradient
from ._natural_gradient import NaturalGradientSettings as NaturalGradientSettings
from ._report import RefreshError as RefreshError
from ._report import RefreshReport as RefreshReport
from ._schedules import growing as growing
from ._structured import StructuredGeometry as StructuredGeometry
