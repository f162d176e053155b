"""The operations of token merging on tensors.

`match` finds a slot map, `merge` and `unmerge` apply it, `log_sizes` gives the weights of its slots for attention, and
`places` where they stand.

All shapes follow from the arguments' shapes and from Python numbers, never from data, so that one graph serves
every input. Nothing draws random numbers.
"""

from tome_fx.ops.matching import SlotMap, as_read, grid_of, kept, match, ratio_of
from tome_fx.ops.merging import changed, log_sizes, merge, unmerge
from tome_fx.ops.placing import after_text, line_of, match_along, match_frames, places

__all__ = [
    "SlotMap",
    "after_text",
    "as_read",
    "changed",
    "grid_of",
    "kept",
    "line_of",
    "log_sizes",
    "match",
    "match_along",
    "match_frames",
    "merge",
    "places",
    "ratio_of",
    "unmerge",
]

for _name in __all__:  # so that printed graphs and tracebacks name them as they are imported
    globals()[_name].__module__ = __name__
