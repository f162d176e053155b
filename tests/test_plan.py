"""The contract of `tome_fx.plan`.

An option that is wrong, out of range or without effect is refused, in words that name it, what is allowed and what
came. The arithmetic of the grid is that of a count by hand, `kept` rounds as tomesd does, and `scramble` is one
well-mixed function of ints and int tensors alike.
"""

import dataclasses
import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tomesd.patch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tome_fx.families.unet import merged_around, scopes_of
from tome_fx.plan import DOWNSAMPLES, TOMESD, Grid, Plan, Side, downsampled, kept, scramble

WIDEST = 2**33 - 1  # what scramble is made for

RATIO = "ratio must be between 0 and {}, the share of sources at a stride of {}; got {}"
STRIDE = "{} must be at least 1 token, got {}"
INTEGER = "{} must be an int, got {} of type {}"
OR_ELSE = {
    "tile": "tile must be an int or None, got {} of type {}",
    "max_downsample": "max_downsample must be an int or None or 'finest', got {} of type {}",
}
NUMBER = "ratio must be a number, got {} of type {}"
SEED = "seed must be between 0 and 2**32 - 1, got {}"
LEVEL = "max_downsample must be None, 'finest' or one of (1, 2, 4, 8), got {}"
TILE = "tile must be None or at least {} tokens, to hold a cell of sx x sy, {}; got {}"
PART = "{}={} does nothing with merge_block=True, which merges around the whole block; leave it out"

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ratio": -0.01}, ValueError, RATIO.format("0.75", "2 x 2", "-0.01")),
    ({"ratio": math.nextafter(0.75, 1)}, ValueError, RATIO.format("0.75", "2 x 2", "0.7500000000000001")),
    ({"ratio": 0.9, "sx": 3}, ValueError, RATIO.format("0.8333", "3 x 2", "0.9")),
    ({"ratio": 0.6, "sx": 1}, ValueError, RATIO.format("0.5", "1 x 2", "0.6")),
    ({"ratio": 1}, ValueError, RATIO.format("0.75", "2 x 2", "1")),
    ({"ratio": math.nan}, ValueError, RATIO.format("0.75", "2 x 2", "nan")),
    ({"ratio": math.inf}, ValueError, RATIO.format("0.75", "2 x 2", "inf")),
    ({"ratio": -math.inf}, ValueError, RATIO.format("0.75", "2 x 2", "-inf")),
    ({"ratio": True}, TypeError, NUMBER.format("True", "bool")),
    ({"ratio": "0.5"}, TypeError, NUMBER.format("'0.5'", "str")),
    ({"ratio": None}, TypeError, NUMBER.format("None", "NoneType")),
    *(
        case
        for name in ("sx", "sy")
        for case in (
            ({name: 0}, ValueError, STRIDE.format(name, 0)),
            ({name: -2}, ValueError, STRIDE.format(name, -2)),
            ({name: 2.0}, TypeError, INTEGER.format(name, "2.0", "float")),
            ({name: True}, TypeError, INTEGER.format(name, "True", "bool")),
        )
    ),
    ({"sx": 1, "sy": 1}, ValueError, "sx and sy of 1 x 1 leave no source to merge: one of them must be at least 2"),
    ({"max_downsample": 3}, ValueError, LEVEL.format(3)),
    ({"max_downsample": 0}, ValueError, LEVEL.format(0)),
    ({"max_downsample": 16}, ValueError, LEVEL.format(16)),
    ({"max_downsample": True}, TypeError, OR_ELSE["max_downsample"].format("True", "bool")),
    ({"max_downsample": 2.0}, TypeError, OR_ELSE["max_downsample"].format("2.0", "float")),
    ({"max_downsample": "coarsest"}, TypeError, OR_ELSE["max_downsample"].format("'coarsest'", "str")),
    ({"tile": 1}, ValueError, TILE.format(2, "2 x 2", 1)),
    ({"tile": 3, "sy": 4}, ValueError, TILE.format(4, "2 x 4", 3)),
    ({"tile": 4, "sx": 5}, ValueError, TILE.format(5, "5 x 2", 4)),
    ({"tile": 0}, ValueError, TILE.format(2, "2 x 2", 0)),
    ({"tile": 16.0}, TypeError, OR_ELSE["tile"].format("16.0", "float")),
    ({"tile": True}, TypeError, OR_ELSE["tile"].format("True", "bool")),
    ({"tile": "16"}, TypeError, OR_ELSE["tile"].format("'16'", "str")),
    ({"seed": -1}, ValueError, SEED.format(-1)),
    ({"seed": 2**32}, ValueError, SEED.format(2**32)),
    ({"seed": 1.0}, TypeError, INTEGER.format("seed", "1.0", "float")),
    ({"seed": True}, TypeError, INTEGER.format("seed", "True", "bool")),
    ({"seed": 7, "use_rand": False}, ValueError, "seed=7 does nothing with use_rand=False; leave it at 0"),
    *(
        ({name: value}, TypeError, f"{name} must be True or False, got {value!r}")
        for name in (
            *("use_rand", "merge_attn", "merge_queries", "merge_crossattn", "merge_mlp", "merge_block"),
            *("share_match", "dynamic_ratio"),
        )
        for value in (1, None, "yes")
    ),
    *(({"prop_attn": v}, TypeError, f"prop_attn must be True, False or None, got {v!r}") for v in (1, 0, "yes")),
    (
        {"prop_attn": True, "merge_attn": False, "merge_mlp": True},
        ValueError,
        "prop_attn=True does nothing with merge_attn=False: it weighs merged self-attention",
    ),
    (
        {"merge_attn": False},
        ValueError,
        "nothing to merge: at least one of merge_attn, merge_crossattn, merge_mlp must be True",
    ),
    (
        {"merge_queries": False, "merge_attn": False, "merge_mlp": True},
        ValueError,
        "merge_queries=False does nothing with merge_attn=False: it is about self-attention",
    ),
    *(
        ({"merge_block": True, name: value}, ValueError, PART.format(name, value))
        for name, value in (
            *(("merge_attn", False), ("merge_queries", False)),
            *(("merge_crossattn", True), ("merge_mlp", True)),
        )
    ),
]


@pytest.mark.parametrize("options, error, message", REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_a_wrong_option_is_refused_in_words_that_name_it_what_is_allowed_and_what_came(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Plan(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0},
        {"ratio": 0.75},
        {"ratio": 1 - 1 / 6, "sx": 3},
        {"ratio": 0.5, "sx": 1, "sy": 2},
        {"seed": 2**32 - 1},
        {"use_rand": False, "seed": 0},
        {"merge_attn": False, "merge_mlp": True},
        *({"prop_attn": value} for value in (True, False, None)),
        {"prop_attn": False, "merge_attn": False, "merge_mlp": True},
        *({"max_downsample": level} for level in (*DOWNSAMPLES, "finest", None)),
        {"tile": None},
        {"tile": 2},
        {"tile": 5, "sx": 5, "sy": 1},
        {"merge_block": True, "share_match": False},
        {"merge_queries": False, "merge_crossattn": True},
        TOMESD,
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_allowed(options: dict[str, Any]) -> None:
    made = Plan(**options)
    assert dataclasses.asdict(made) == dataclasses.asdict(Plan()) | options


def test_a_plan_is_frozen_and_equal_plans_serve_as_one_key() -> None:
    made = Plan(ratio=0.25, seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.ratio = 0.5  # type: ignore[misc]
    assert len({made, Plan(ratio=0.25, seed=3), Plan(ratio=0.25, seed=4)}) == 2


@pytest.mark.parametrize(
    "options, scopes",
    [
        ({}, ("attn1",)),
        ({"merge_queries": False}, ("attn1",)),
        ({"merge_crossattn": True}, ("attn1", "attn2")),
        ({"merge_attn": False, "merge_mlp": True}, ("ff",)),
        ({"merge_mlp": True, "merge_crossattn": True}, ("attn1", "attn2", "ff")),
    ],
)
def test_scopes_are_the_modules_merged_around_in_the_order_they_run(
    options: dict[str, Any], scopes: tuple[str, ...]
) -> None:
    plan = Plan(**options)
    assert tuple(scope.module for scope in scopes_of(plan)) == merged_around(plan) == scopes


def test_a_plan_for_whole_blocks_merges_around_no_part_of_them() -> None:
    plan = Plan(merge_block=True)
    assert not scopes_of(plan)
    assert merged_around(plan) == ("block",)


@settings(deadline=None)
@given(*[st.integers(1, 24)] * 2, *[st.integers(1, 5)] * 2, st.floats(0, 1))
@example(3, 9, 4, 2, 0.5)  # lower than a cell
def test_the_grid_counts_what_a_count_by_hand_counts(height: int, width: int, sx: int, sy: int, share: float) -> None:
    ratio = share * (1 - 1 / (sx * sy))
    grid = Grid(height, width, sx, sy, ratio)
    tokens = [(y, x) for y in range(height) for x in range(width)]
    cells = [(y, x) for y, x in tokens if y % sy == x % sx == 0 and y + sy <= height and x + sx <= width]
    merged = 0
    while cells and merged + 1 <= len(tokens) * ratio:
        merged += 1
    assert (grid.tokens, grid.cells) == (len(tokens), len(cells))
    assert (grid.kept, grid.merged) == (len(tokens) - merged, merged)
    assert grid.merged <= grid.tokens - grid.cells, "more tokens are removed than there are sources"
    begun = -(-height // sy) * -(-width // sx) if cells else 0  # cells at the edges are compared as whole ones are
    assert grid.match_flops(7) == 2 * 7 * begun * (begun * sy * sx - begun)
    assert bool(grid.note) == (grid.merged == 0)


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 5), st.integers(0, 20))
@example(35, 2, 14)  # as many cells as tiles can hold, and a token over
def test_a_side_is_cut_into_as_few_tiles_as_hold_its_cells_and_as_evenly(size: int, stride: int, more: int) -> None:
    tile = stride + more
    if size < stride:
        return
    side = Side.of(size, stride, tile)
    cells = [side.each + (i < side.more) for i in range(side.tiles)]
    tokens = [stride * count for count in cells]
    tokens[-1] += size % stride
    assert sum(tokens) == size
    assert max(cells) - min(cells) <= 1
    assert max(cells) * stride <= tile
    assert len(cells) == 1 or (len(cells) - 1) * (tile // stride) < sum(cells), "fewer tiles would do"
    assert side.most == max(-(-count // stride) for count in tokens)
    assert side.longest >= max(tokens)
    assert side.longest < max(tokens) + stride
    assert Side.of(size, stride, None) == Side(size, stride, 1, size // stride, 0, -(-size // stride))
    roomy = Side.of(size, stride, tile, roomy=True)
    assert roomy.most == tile // stride + 1 >= side.most
    assert Side.of(size, stride, None, roomy=True) == Side.of(size, stride, None)


@pytest.mark.parametrize("tile", [2, 4, 6, 8, 16])
@pytest.mark.parametrize("height, width", [(8, 8), (8, 24), (12, 16), (17, 24)])
def test_tiles_compare_the_sources_and_destinations_of_each_tile_alone(height: int, width: int, tile: int) -> None:
    whole, tiled = (Grid(height, width, 2, 2, 0.5, tile=side).match_flops(7) for side in (None, tile))
    if height % tile == width % tile == 0:
        number = (height // tile) * (width // tile)
        assert tiled == number * Grid(tile, tile, 2, 2, 0.5).match_flops(7)
    assert (tiled < whole) == (max(height, width) > tile + 1)


@pytest.mark.parametrize(
    "ratio, kept_as", [(-0.0, "0.0"), (0, "0.0"), (np.float32(0.5), "0.5"), (Fraction(1, 2), "0.5")]
)
def test_a_ratio_is_kept_as_a_float_of_python_s(ratio: Any, kept_as: str) -> None:
    assert repr(Plan(ratio=ratio).ratio) == kept_as
    assert Plan(ratio=np.float32(0.1), dynamic_ratio=True).ratio == 0.1


@pytest.mark.parametrize(
    "grid, note",
    [
        (Grid(1, 8, 2, 2, 0.5), "no whole 2 x 2 cell"),
        (Grid(8, 3, 4, 2, 0.5), "no whole 4 x 2 cell"),
        (Grid(2, 4, 2, 2, 0.1), "no whole token at ratio 0.1"),
        (Grid(2, 4, 2, 2, 0), "the ratio is 0"),
        (Grid(2, 4, 2, 2, 0.5), ""),
    ],
)
def test_a_grid_says_why_nothing_is_merged(grid: Grid, note: str) -> None:
    assert grid.note == note


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.75])
@pytest.mark.parametrize("height, width", [(2, 2), (4, 6), (7, 9), (16, 12), (5, 2)])
def test_kept_rounds_as_tomesd_rounds(height: int, width: int, ratio: float) -> None:
    options = {"max_downsample": 1, "ratio": ratio, "sx": 2, "sy": 2, "use_rand": False, "generator": None}
    scopes = {"merge_attn": True, "merge_crossattn": False, "merge_mlp": False}
    tokens = torch.arange(1.0, height * width + 1).view(1, -1, 1)
    merge, *_ = tomesd.patch.compute_merge(tokens, {"size": (height, width), "args": options | scopes})
    assert kept(height, width, ratio) == merge(tokens).shape[1]


@pytest.mark.parametrize("factor", DOWNSAMPLES)
def test_the_side_of_a_level_is_that_of_stride_two_convolutions(factor: int) -> None:
    for size in range(1, 40):
        side = size
        for _ in range(factor.bit_length() - 1):
            side = (side + 2 * 1 - 3) // 2 + 1  # kernel 3, padding 1
        assert downsampled(size, factor) == side


@settings(deadline=None)
@given(st.lists(st.integers(0, WIDEST), min_size=1))
@example([0, 1, 2**16, 2**31, 2**32 - 1, 2**32, WIDEST])
def test_scramble_is_the_same_for_ints_and_for_int64_tensors(values: list[int]) -> None:
    hashes = [scramble(value) for value in values]
    assert scramble(torch.tensor(values)).tolist() == hashes
    assert all(0 <= value < 2**32 for value in hashes)


class Watched(int):
    """An int whose products are no wider than scramble says."""

    def __rshift__(self, by: int) -> "Watched":
        return Watched(int(self) >> by)

    def __xor__(self, other: int) -> "Watched":
        return Watched(int(self) ^ other)

    def __and__(self, other: int) -> "Watched":
        return Watched(int(self) & other)

    def __mul__(self, other: int) -> "Watched":
        assert int(self) * other < 2**60
        return Watched(int(self) * other)


@given(st.integers(0, WIDEST))
@example(WIDEST)
@example(0x1FFFE0000)  # x ^ x >> 16 is all ones
def test_no_product_in_scramble_overflows(value: int) -> None:
    assert scramble(Watched(value)) == scramble(value)


@pytest.mark.parametrize("places", [4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2, 15, 2**32 - 1])
def test_destinations_are_spread_evenly_over_the_places_of_a_cell(places: int, seed: int) -> None:
    cells = 4096
    first = Plan(seed=seed).cell_seed
    assert first is not None
    counts = Counter(scramble(cell + first) % places for cell in range(cells))
    deviation = math.sqrt(cells * (places - 1)) / places  # of a fair die's count
    assert all(abs(counts[place] - cells / places) < 4 * deviation for place in range(places)), counts


def test_every_seed_has_destinations_of_its_own() -> None:
    seeds = [Plan(seed=seed).cell_seed for seed in (*range(64), 2**31, 2**32 - 1)]
    cells = torch.arange(1024)
    patterns = torch.stack([scramble(cells + torch.tensor(seed)) % 4 for seed in seeds])
    agreement = (patterns[:, None] == patterns).double().mean(-1).fill_diagonal_(0)
    assert agreement.max() < 0.25 + 5 * math.sqrt(0.25 * 0.75 / len(cells)), "two seeds share a pattern"


def test_a_seed_leaves_room_for_the_cells_and_there_is_none_without_randomness() -> None:
    for seed in (0, 7, 2**32 - 1):
        first = Plan(seed=seed).cell_seed
        assert first is not None
        assert 0 <= first < 2**32
    assert Plan(use_rand=False).cell_seed is None
