"""Token merging as a compiler pass: a diffusers model in, one with fewer tokens out, `torch.compile` takes it whole."""

from tome_fx import viz
from tome_fx.api import set_ratio, transform
from tome_fx.plan import TOMESD, TransformError, __version__
from tome_fx.tools.diagnose import diagnose
from tome_fx.tools.diagnosis import Diagnosis, Finding
from tome_fx.tools.explain import Report, SiteReport, explain
from tome_fx.tools.schedule import RatioSchedule

__all__ = [
    "TOMESD",
    "Diagnosis",
    "Finding",
    "RatioSchedule",
    "Report",
    "SiteReport",
    "TransformError",
    "__version__",
    "diagnose",
    "explain",
    "set_ratio",
    "transform",
    "viz",
]
