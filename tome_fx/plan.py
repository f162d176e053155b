"""What to merge, in plain numbers: a frozen, checked plan and the arithmetic of the token grid.

No tensor is touched here. `kept`, `kept_by_thousandths` and `scramble` are written so that they also serve symbolic
ints and int tensors: graphs call the same functions while they run.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

__version__ = "0.2.0"

PARTS = ("merge_attn", "merge_crossattn", "merge_mlp")  # options that merge around a part of a block
DOWNSAMPLES = (1, 2, 4, 8)
FINEST = "finest"
MERGING = "tome_fx"  # the attribute that holds a transformed model's merging

# Options of `transform` that make it tomesd's mathematics: what it is compared by.
TOMESD: dict[str, Any] = {"tile": None, "max_downsample": FINEST, "prop_attn": False, "share_match": False}

# What is always left to do with a call that merging cannot serve, as errors end
OR_MERGE_NOTHING = "or merge nothing, by ratio=0 and not dynamic_ratio"

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
    tile: int | None = 32
    max_downsample: int | str | None = None
    sx: int = 2
    sy: int = 2
    use_rand: bool = True
    seed: int = 0
    merge_attn: bool = True
    merge_queries: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    merge_block: bool = False
    prop_attn: bool | None = None
    share_match: bool = True
    dynamic_ratio: bool = False

    def __post_init__(self) -> None:
        for name in ("sx", "sy"):
            stride = integer(name, getattr(self, name))
            if stride < 1:
                raise ValueError(f"{name} must be at least 1 token, got {stride}")
        if self.sx * self.sy == 1:
            raise ValueError("sx and sy of 1 x 1 leave no source to merge: one of them must be at least 2")
        number("ratio", self.ratio)
        highest = 1 - 1 / (self.sx * self.sy)
        shown = math.floor(highest * 10**4) / 10**4  # rounded to the nearest it might be one that is refused
        if not 0 <= self.ratio <= highest:  # NaN fails every comparison, so it ends here as well
            raise ValueError(
                f"ratio must be between 0 and {shown}, the share of sources at a stride of "
                f"{self.sx} x {self.sy}; got {self.ratio}"
            )
        object.__setattr__(self, "ratio", float(self.ratio) + 0.0)  # for graphs are kept by it: not -0.0, not numpy's
        least = max(self.sx, self.sy)
        if self.tile is not None and integer("tile", self.tile, or_else="None") < least:
            raise ValueError(
                f"tile must be None or at least {least} tokens, to hold a cell of sx x sy, {self.sx} x {self.sy}; "
                f"got {self.tile}"
            )
        asked, words = self.max_downsample, f"None or {FINEST!r}"
        named = asked is None or (isinstance(asked, str) and asked == FINEST)
        if not named and integer("max_downsample", asked, or_else=words) not in DOWNSAMPLES:
            raise ValueError(f"max_downsample must be None, {FINEST!r} or one of {DOWNSAMPLES}, got {asked}")
        for name in ("use_rand", *PARTS, "merge_queries", "merge_block", "share_match", "dynamic_ratio"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not (self.prop_attn is None or isinstance(self.prop_attn, bool)):
            raise TypeError(f"prop_attn must be True, False or None, got {self.prop_attn!r}")
        if not 0 <= integer("seed", self.seed) < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if self.seed and not self.use_rand:
            raise ValueError(f"seed={self.seed} does nothing with use_rand=False; leave it at 0")
        if self.dynamic_ratio:
            thousandths = round(self.ratio * THOUSAND) / THOUSAND
            if abs(thousandths - self.ratio) > 1e-7:  # as far as fp32 may be off
                raise ValueError(
                    f"ratio must be a whole number of thousandths with dynamic_ratio=True, got {self.ratio}"
                )
            if thousandths != self.ratio:
                object.__setattr__(self, "ratio", thousandths)  # 0.1 + 0.2 is meant to be 0.3
        if self.merge_block:
            self._refuse_parts_of_a_block()
        elif not any(getattr(self, part) for part in PARTS):
            raise ValueError(f"nothing to merge: at least one of {', '.join(PARTS)} must be True")
        elif not self.merge_attn:
            if self.prop_attn:
                raise ValueError("prop_attn=True does nothing with merge_attn=False: it weighs merged self-attention")
            if not self.merge_queries:
                raise ValueError("merge_queries=False does nothing with merge_attn=False: it is about self-attention")

    def _refuse_parts_of_a_block(self) -> None:
        defaults = {"merge_attn": True, "merge_queries": True, "merge_crossattn": False, "merge_mlp": False}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={not default} does nothing with merge_block=True, which merges around the whole block; "
                    "leave it out"
                )

    @property
    def matches(self) -> bool:
        """Whether tokens are compared at all: a dynamic ratio of 0 compares them and merges none."""
        return self.dynamic_ratio or self.ratio > 0

    @property
    def cell_seed(self) -> int | None:
        """What the cells of a grid are numbered from, or None where destinations are each cell's top left.

        It is one for all blocks, so that those of a level choose alike: the compiler then makes one kernel for them
        all, and images were as close to the unmerged ones as with a choice for each block.
        """
        return scramble(self.seed) if self.use_rand else None


@dataclass  # as Tiles
class Side:
    """How a side of a grid with at least one whole cell is cut into tiles, as evenly as its cells can be dealt out.

    The last tile also has the tokens beyond the last whole cell.

    Args:
        size: Tokens of the side.
        stride: Tokens of a cell.
        tiles: How many.
        each: Cells of a tile.
        more: Tiles at the beginning that have one cell more.
        most: Cells that every tile is laid out with: those of the largest, one that is not whole included, or more.
    """

    size: int
    stride: int
    tiles: int
    each: int
    more: int
    most: int

    @classmethod
    def of(cls, size: int, stride: int, tile: int | None, *, roomy: bool = False) -> "Side":
        """Tiles of at most `tile` tokens, but for those beyond the last cell; None for one tile.

        Roomy ones are laid out with as many cells as any could have, a number that does not hang on the size.
        """
        cells = size // stride
        count = 1 if tile is None else 1 + (cells - 1) // (tile // stride)
        largest = (size + stride * count - 1) // (stride * count)
        most = tile // stride + 1 if roomy and tile is not None else largest
        return cls(size, stride, count, cells // count, cells % count, most)

    @property
    def longest(self) -> int:
        """A length that no tile exceeds: that of all tiles where they are alike and the cells leave no token over."""
        return self.most * self.stride


@dataclass(frozen=True)
class Grid:
    """A `height x width` grid of tokens and what a match leaves of it. All counts are per image."""

    height: int
    width: int
    sx: int
    sy: int
    ratio: float
    dynamic_ratio: bool = False
    tile: int | None = None

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
        if not self.ratio:
            return "the ratio is 0"
        return "" if self.merged else f"no whole token at ratio {self.ratio}"

    def match_flops(self, channels: int) -> int:
        """Multiply-adds of all similarities, times two: of every source of a tile with every destination of it.

        Tiles are counted as the largest of them, and cells that are not whole as whole ones, for so they are compared.
        """
        if not self.cells:
            return 0
        down, right = Side.of(self.height, self.sy, self.tile), Side.of(self.width, self.sx, self.tile)
        destinations = down.most * right.most
        sources = down.longest * right.longest - destinations
        return 2 * down.tiles * right.tiles * sources * destinations * channels


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


def is_number(value: Any) -> bool:
    """Whether a value is a real number, numpy's too: a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number(name: str, value: Any) -> float:
    """The value itself, or a TypeError that names the argument."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def integer(name: str, value: Any, *, or_else: str = "") -> int:
    """The value itself, or a TypeError that names the argument and what else is allowed: a bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, int):
        allowed = " or ".join(filter(None, ["an int", or_else]))
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}")
    return value
