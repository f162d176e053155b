"""What to merge, in plain numbers: a frozen, checked plan and the arithmetic of the token grid.

No tensor is touched here. `kept`, `kept_by_thousandths` and `scramble` are written so that they also serve symbolic
ints and int tensors: graphs call the same functions while they run.
"""

import math
from dataclasses import dataclass
from typing import Any

__version__ = "0.1.0"

# The sub-modules of a transformer block that a scope merges around, in the order in which they run.
SCOPES = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}
DOWNSAMPLES = (1, 2, 4, 8)
MERGING = "tome_fx"  # the attribute that holds a transformed model's merging

THOUSAND = 1000  # a dynamic ratio is a whole number of thousandths


class TransformError(RuntimeError):
    """A model that cannot be transformed, or a call that merging cannot serve; says where, what and why."""


@dataclass(frozen=True)
class Plan:
    """The options of one `transform`, checked. See `tome_fx.transform` for what each means.

    Raises:
        TypeError: An option is of the wrong type (a bool is not a number).
        ValueError: An option is out of range, or would do nothing.
    """

    ratio: float = 0.5
    max_downsample: int | None = None
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    seed: int = 0
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    prop_attn: bool = False
    share_match: bool = False
    dynamic_ratio: bool = False

    def __post_init__(self) -> None:
        for name in ("sx", "sy"):
            stride = integer(name, getattr(self, name))
            if stride < 1:
                raise ValueError(f"{name} must be at least 1 token, got {stride}")
        if self.sx * self.sy == 1:
            raise ValueError("sx and sy of 1 x 1 leave no source to merge: one of them must be at least 2")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio must be a number, got {self.ratio!r} of type {type(self.ratio).__name__}")
        highest = 1 - 1 / (self.sx * self.sy)
        if not 0 <= self.ratio <= highest:  # NaN fails every comparison, so it ends here as well
            raise ValueError(
                f"ratio must be between 0 and {highest:.4g}, the share of sources at a stride of "
                f"{self.sx} x {self.sy}; got {self.ratio}"
            )
        if self.max_downsample is not None and integer("max_downsample", self.max_downsample) not in DOWNSAMPLES:
            raise ValueError(f"max_downsample must be None or one of {DOWNSAMPLES}, got {self.max_downsample}")
        for name in ("use_rand", *SCOPES, "prop_attn", "share_match", "dynamic_ratio"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not 0 <= integer("seed", self.seed) < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if self.seed and not self.use_rand:
            raise ValueError(f"seed={self.seed} does nothing with use_rand=False; leave it at 0")
        if self.dynamic_ratio and abs(round(self.ratio, 3) - self.ratio) > 1e-9:  # 0.1 + 0.2 is meant to be 0.3
            raise ValueError(f"ratio must be a whole number of thousandths with dynamic_ratio=True, got {self.ratio}")
        if self.prop_attn and not self.merge_attn:
            raise ValueError("prop_attn=True does nothing with merge_attn=False: it weighs merged self-attention")
        if not self.scopes:
            raise ValueError(f"nothing to merge: at least one of {', '.join(SCOPES)} must be True")

    @property
    def scopes(self) -> tuple[str, ...]:
        """The sub-modules to merge around, a subset of `SCOPES`' values."""
        return tuple(module for scope, module in SCOPES.items() if getattr(self, scope))

    @property
    def matches(self) -> bool:
        """Whether tokens are compared at all: a dynamic ratio of 0 compares them and merges none."""
        return self.dynamic_ratio or self.ratio > 0

    @property
    def cell_seed(self) -> int | None:
        """What the cells of a grid are numbered from, or None where destinations are each cell's top left.

        It is one for all blocks, so that those of a level choose alike: the compiler then makes one kernel for them
        all and computes it once, and images were as close to the unmerged ones as with a choice for each block.
        """
        return scramble(self.seed) if self.use_rand else None


@dataclass(frozen=True)
class Grid:
    """A `height x width` grid of tokens and what a match leaves of it. All counts are per image."""

    height: int
    width: int
    sx: int
    sy: int
    ratio: float
    dynamic_ratio: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.height * self.width

    @property
    def cells(self) -> int:
        """Whole `sy x sx` cells, each of which gives one destination; tokens outside of them are sources."""
        return (self.height // self.sy) * (self.width // self.sx)

    @property
    def kept(self) -> int:
        """Tokens after a merge; all of them where the grid holds no whole cell."""
        if not self.cells:
            return self.tokens
        if self.dynamic_ratio:
            return kept_by_thousandths(self.height, self.width, round(self.ratio * THOUSAND))
        return kept(self.height, self.width, self.ratio)

    @property
    def merged(self) -> int:
        """Tokens removed by a merge."""
        return self.tokens - self.kept

    @property
    def note(self) -> str:
        """Why nothing is merged; empty where something is."""
        if not self.cells:
            return f"no whole {self.sx} x {self.sy} cell"
        return "" if self.merged else f"no whole token at ratio {self.ratio}"

    def match_flops(self, channels: int) -> int:
        """Multiply-adds of the score matrix, times two: every source against every destination."""
        return 2 * (self.tokens - self.cells) * self.cells * channels


def kept(height: int, width: int, ratio: float) -> int:
    """Tokens that remain of `height x width`: tomesd's rounding, `tokens - int(tokens * ratio)`."""
    tokens = height * width
    return tokens - math.floor(tokens * ratio)  # not int(), which would make a constant of a symbolic number


def kept_by_thousandths(height: int, width: int, thousandths: int) -> int:
    """Tokens that remain at a dynamic ratio: one fewer than `kept` where a float falls short of a whole token."""
    tokens = height * width
    return tokens - tokens * thousandths // THOUSAND


def scramble(x: Any) -> Any:
    """A well-mixed 32-bit hash of a non-negative int below 2**33, or of every element of an int64 tensor.

    All products stay below 2**60, so that no integer overflows and eager, compiled, CPU and GPU agree.
    Source: the two-round multiply-xorshift hash of T. Mueller, as measured by C. Wellons, "Prospecting for
    Hash Functions" (2018).
    """
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def downsampled(size: int, factor: int) -> int:
    """The side of a level whose tokens are `factor` latents wide: stride-2 convolutions round up."""
    return math.ceil(size / factor)


def integer(name: str, value: Any) -> int:
    """The value itself, or a TypeError that names the argument: a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    return value
