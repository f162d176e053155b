"""Options of `transform`, each by itself: what holds of a transform is shown for every one of them."""

from collections.abc import Collection
from typing import Any

import pytest

from support.speed import slow_but
from tome_fx import TOMESD

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiles-of-4": {"tile": 4},
    "tiles-of-6": {"tile": 6},
    "weighed": {"prop_attn": True},
    "unweighed": {"prop_attn": False},
    "each-block": {"share_match": False},
    "finest": {"max_downsample": "finest"},
    "keys": {"merge_queries": False},
    "blocks": {"merge_block": True},
    "blocks-each": {"merge_block": True, "share_match": False},
    "tomesd": TOMESD,
}
MODES = ("keys", "blocks")  # those that make other graphs than the default does
# Those that make graphs of their own where no transformer has several blocks
OF_ONE_BLOCK = tuple(name for name in OPTIONS if name not in ("weighed", "each-block", "finest", "blocks-each"))
# Those that are compiled ahead of time, which takes what Inductor makes of all of them
FEW = ("default", *MODES, "tomesd")


def each_option(*fast: str, of: Collection[str] = OPTIONS) -> pytest.MarkDecorator:
    """The options in turn, or some of them, all but those named fast marked slow."""
    return pytest.mark.parametrize("options", slow_but(fast, [pytest.param(OPTIONS[name], id=name) for name in of]))
