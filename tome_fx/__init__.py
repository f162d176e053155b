"""Token merging as a compiler pass: a diffusers UNet in, one with fewer tokens out, `torch.compile` takes it whole."""

from tome_fx.api import transform
from tome_fx.explain import Report, Row, explain
from tome_fx.plan import TransformError, __version__

__all__ = ["Report", "Row", "TransformError", "__version__", "explain", "transform"]
