"""The contract of `tome_fx.ops`.

`match` merges the `int(N * ratio)` sources most similar to a destination into it, `merge` is the mean of each slot
and `unmerge` a copy of it: what plain loops over Python floats give. A slot map uses each of its K slots, whatever
the tokens hold. Dtypes are kept, gradients are right, nothing is random, two runs agree bit for bit, and no shape
depends on data, so that every compiler takes the operations whole.
"""

import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.speed import slow
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tome_fx import ops, plan
from tome_fx.ops import matching, tiling
from tome_fx.ops.tiling import Tiles

Grid = tuple[int, int, int, int]  # height, width, sx, sy
GRIDS: list[Grid] = [(4, 4, 2, 2), (7, 9, 2, 2), (5, 3, 2, 2), (8, 8, 4, 4), (9, 6, 4, 4), (6, 7, 2, 3), (3, 8, 1, 2)]
SEEDS = [None, 0, 12345, 2**32 - 1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]
if torch.cuda.is_available():  # cuBLAS reads this once, at its first call, and is deterministic with it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

# Sums of floats in no fixed order, shapes that depend on data, and draws from a generator: none may be traced.
FORBIDDEN = {
    *("nonzero", "nonzero_static", "masked_select", "masked_scatter", "unique_dim", "unique_consecutive", "_unique2"),
    *("bincount", "histc", "repeat_interleave", "_local_scalar_dense", "scatter_add", "scatter_reduce", "index_add"),
    *("rand", "rand_like", "randn", "randn_like", "randint", "randperm", "bernoulli", "multinomial"),
}


@pytest.fixture(params=[False, True], ids=["", "torch refuses what is not deterministic"])
def deterministic_algorithms(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.use_deterministic_algorithms` off and on, for one test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


def random_tokens(
    count: int, channels: int = 6, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64).to(dtype)


def match(
    tokens: Tensor, grid: Grid, ratio: float, seed: int | None = None, tile: int | None = None
) -> ops.SlotMap | None:
    height, width, sx, sy = grid
    kept = plan.kept(height, width, ratio)
    return ops.match(tokens, height, width, kept=kept, sx=sx, sy=sy, seed=seed, tile=tile)


def matched(tokens: Tensor, grid: Grid, ratio: float, seed: int | None = None, tile: int | None = None) -> ops.SlotMap:
    slots = match(tokens, grid, ratio, seed, tile)
    assert slots is not None, "nothing is merged"
    return slots


def round_trip(
    tokens: Tensor, grid: Grid, ratio: float, seed: int | None, tile: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    slots = matched(tokens, grid, ratio, seed, tile)
    merged = ops.merge(tokens, slots)
    return slots.slot, merged, ops.unmerge(merged, slots)


class Recorder(TorchDispatchMode):
    """The names of the aten operations that run, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# The reference: plain loops, in float64.


def naive_destinations(grid: Grid, seed: int | None) -> list[int]:
    height, width, sx, sy = grid
    found: list[int] = []
    for row in range(height // sy):
        for column in range(width // sx):
            place = 0 if seed is None else plan.scramble(len(found) + seed) % (sx * sy)
            found.append((row * sy + place // sx) * width + column * sx + place % sx)
    return found


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / length if length else 0.0


def naive_tiles(grid: Grid, tile: int | None) -> list[list[int]]:
    """The tokens of each tile: cells dealt out evenly along each side, what is beyond the last of them to the last."""
    height, width, sx, sy = grid

    def edges(size: int, stride: int) -> list[int]:
        cells = size // stride
        count = 1 if tile is None else math.ceil(cells / (tile // stride))
        own = [cells // count + (i < cells % count) for i in range(count)]
        return [stride * sum(own[:i]) for i in range(count)] + [size]

    rows, columns = edges(height, sy), edges(width, sx)
    return [
        [y * width + x for y in range(top, bottom) for x in range(left, right)]
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


def naive_slots(
    tokens: list[list[float]], grid: Grid, ratio: float, seed: int | None, tile: int | None = None
) -> dict[int, int]:
    """The slot that each destination and each merged source belongs to; sources that stay alone are left out."""
    destinations, total = naive_destinations(grid, seed), int(len(tokens) * ratio)
    slots: dict[int, int] = {}
    before = first = 0
    for members in naive_tiles(grid, tile):
        own = [token for token in destinations if token in members]
        best = {}
        for source in set(members) - set(own):
            scores = [cosine(tokens[source], tokens[destination]) for destination in own]
            best[source] = max(scores), scores.index(max(scores))
        after = before + len(members)
        merged = after * total // len(tokens) - before * total // len(tokens)
        closest = sorted(best, key=lambda source: best[source][0], reverse=True)
        slots |= {destination: first + cell for cell, destination in enumerate(own)}
        slots |= {source: first + best[source][1] for source in closest[:merged]}
        before, first = after, first + len(members) - merged
    return slots


def naive_merge(tokens: list[list[float]], slot: list[int], kept: int) -> list[list[float]]:
    groups = [[token for token, place in zip(tokens, slot, strict=True) if place == k] for k in range(kept)]
    return [[math.fsum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]


def assert_slot_map(slot: Tensor, count: int, ratio: float, batch: int) -> int:
    """Every slot of K is used and no other, in each image; returns K."""
    kept = count - int(count * ratio)
    assert (slot.dtype, slot.shape) == (torch.int32, (batch, count))
    for places in slot.tolist():
        assert set(places) == set(range(kept))
    return kept


def assert_matches_naive(tokens: Tensor, grid: Grid, ratio: float, seed: int | None, tile: int | None = None) -> None:
    slot, merged, restored = round_trip(tokens, grid, ratio, seed, tile)
    kept = assert_slot_map(slot, tokens.shape[1], ratio, tokens.shape[0])
    for image, places, means, spread in zip(tokens.tolist(), slot.tolist(), merged, restored, strict=True):
        expected = naive_slots(image, grid, ratio, seed, tile)
        assert {token: places[token] for token in expected} == expected
        reference = torch.tensor(naive_merge(image, places, kept), dtype=tokens.dtype, device=tokens.device)
        torch.testing.assert_close(means, reference, rtol=1e-12, atol=1e-12)
        assert torch.equal(spread, means[places])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [None, 4, 5, 6])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_match_merge_and_unmerge_are_what_plain_loops_give(
    grid: Grid, seed: int | None, tile: int | None, device: str
) -> None:
    height, width, sx, sy = grid
    tokens = random_tokens(height * width).to(device)
    for ratio in (0.1, 0.3, 0.5, 1 - 1 / (sx * sy)):
        if ratio <= 1 - 1 / (sx * sy):
            assert_matches_naive(tokens, grid, ratio, seed, tile)


@pytest.mark.parametrize("tile", [2, 4, 8])
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_tiles_of_every_remainder_are_what_plain_loops_give(tile: int, ratio: float) -> None:
    for height, width in itertools.product((2, 3, 8, 9, 11, 13), (2, 5, 8, 10, 15)):
        assert_matches_naive(random_tokens(height * width), (height, width, 2, 2), ratio, 7, tile)


@pytest.mark.parametrize("tile", [None, 4, 5, 6])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_token_has_a_place_in_its_tile_and_the_destinations_are_those_of_the_whole_grid(
    grid: Grid, seed: int | None, tile: int | None
) -> None:
    tiles, members = Tiles.of(*grid, tile, seed, torch.device("cpu")), naive_tiles(grid, tile)
    assert [sorted({*tokens} - {-1}) for tokens in tiles.token_of_place.tolist()] == members
    for tokens, places, inside in zip(tiles.token_of_place, tiles.place_of_position, members, strict=True):
        assert tokens[places[places >= 0]].tolist() == inside
    first = tiles.token_of_place[:, : tiles.destinations].flatten().tolist()
    assert sorted({*first} - {-1}) == sorted(naive_destinations(grid, seed))


def test_a_tile_as_large_as_the_grid_is_the_whole_grid() -> None:
    tokens = random_tokens(8 * 10)
    whole, tile = (matched(tokens, (8, 10, 2, 2), 0.4, 3, tile) for tile in (None, 10))
    assert all(torch.equal(*pair) for pair in zip(whole, tile, strict=True))
    assert not torch.equal(whole.slot, matched(tokens, (8, 10, 2, 2), 0.4, 3, 4).slot)


def test_every_tile_merges_its_own_share_and_all_of_them_what_is_asked() -> None:
    grid = (22, 37, 2, 2)
    tokens = random_tokens(22 * 37)
    for ratio in (0.1, 0.37, 0.5, 0.7):
        slot = matched(tokens, grid, ratio, 3, 8).slot
        assert_slot_map(slot, 22 * 37, ratio, 2)
        for members in naive_tiles(grid, 8):
            for image in slot:
                merged = len(members) - len(image[members].unique())
                assert abs(merged - ratio * len(members)) <= 1.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_search_in_parts_gives_the_bits_of_a_search_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(48 * 40, channels=64, dtype=dtype)
    at_once = matched(tokens, (48, 40, 2, 2), 0.5, 3)
    for parts in (2, 3, 7):
        monkeypatch.setattr(matching, "SCORES", math.ceil(3 * 24 * 20 / parts) * 24 * 20 * 4)
        with Recorder() as recorder:
            found = matched(tokens, (48, 40, 2, 2), 0.5, 3)
        assert recorder.names.count("bmm") == parts
        for a, b in zip(at_once, found, strict=True):
            assert torch.equal(a, b)


@st.composite
def similarities(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Numbers `[B, T, S]` among which there are equals, NaN and what a gap has, and places `[B, T, P]` of them."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 12)))
    values = torch.tensor([0.0, -0.0, 0.5, 0.25, -1.0, -math.inf, math.nan], dtype=draw(st.sampled_from(DTYPES)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    similar = values[torch.randint(len(values), shape, generator=generator)]
    return similar, torch.randint(shape[2], (*shape[:2], 9), generator=generator)


@settings(max_examples=80, deadline=None)
@given(similarities())
def test_counting_ranks_as_sorting_does(case: tuple[Tensor, Tensor]) -> None:
    similar, source = case
    counted = matching._counted(similar, source)
    assert torch.equal(counted, matching._sorted(similar, source))
    order = similar.argsort(dim=2, descending=True, stable=True)
    assert torch.equal(order.gather(2, counted.long()), source)


@pytest.mark.parametrize("tile", [None, 4, 8])
def test_a_device_that_counts_matches_as_one_that_sorts(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU sorts, and is made to count here."""
    tokens = random_tokens(13 * 17)
    expected = matched(tokens, (13, 17, 2, 2), 0.6, 1, tile)
    monkeypatch.setattr(matching, "_is_counted", lambda values, above=0: True)
    with Recorder() as recorder:
        counted = matched(tokens, (13, 17, 2, 2), 0.6, 1, tile)
    assert "sort" not in recorder.names
    for a, b in zip(counted, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("side", [32, 33, 64, 65])
def test_a_default_tile_is_never_sorted_where_counting_is_one_kernel(side: int) -> None:
    with Recorder() as recorder:
        matched(torch.empty(1, side**2, 4, device="meta"), (side, side, 2, 2), 0.5, 1, 32)
    assert "sort" not in recorder.names


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "ignore:torch.searchsorted:UserWarning")
@pytest.mark.usefixtures("counts")
def test_images_that_are_mapped_over_are_matched_as_those_of_a_batch() -> None:
    tokens = random_tokens(13 * 17, batch=3)
    expected = matched(tokens, (13, 17, 2, 2), 0.6, 1, 8)
    found = torch.vmap(lambda one: matched(one[None], (13, 17, 2, 2), 0.6, 1, 8).slot[0])(tokens)
    assert torch.equal(found, expected.slot)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.sampled_from([torch.int16, torch.int32]), st.data())
def test_counting_puts_in_order_as_sorting_does(
    batch: int, tiles: int, count: int, dtype: torch.dtype, data: Any
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    largest = data.draw(st.sampled_from([1, 4, 2**15 - 1]))
    slot = torch.randint(largest + 1, (batch, tiles, count), generator=generator).to(dtype)
    for counts in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(matching, "_is_counted", lambda values, above=0, counts=counts: counts)
            found = matching._in_order(slot, lambda slot, position: (slot + 1, 2 * position))
        in_order, position = slot.long().sort(dim=2, stable=True)
        for ours, theirs in zip(found, (in_order + 1, 2 * position), strict=True):
            assert torch.equal(ours.long(), theirs)


def largest(side: int, tile: int | None, device: str = "cpu") -> int:
    """Bytes of the largest tensor of a site that is matched, merged, weighed and unmerged, without its tokens."""
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(part.numel() * part.itemsize for part in tree_leaves(result) if isinstance(part, Tensor))
            return result

    with FakeTensorMode(), Sizes():  # type: ignore[no-untyped-call]
        tokens = torch.empty(1, side * side, 8, device=device)
        slots = matched(tokens, (side, side, 2, 2), 0.5, 3, tile)
        ops.unmerge(ops.merge(tokens, slots), slots)
        ops.log_sizes(tokens, slots, 8)
    return max(sizes)


def test_the_largest_tensor_of_a_site_grows_with_its_tokens_and_of_the_whole_grid_stays_bounded() -> None:
    for device in ("cpu", "meta"):  # of which the second counts what the first sorts
        for tile in (16, 32):
            per_token = [largest(side, tile, device) / side**2 for side in (32, 64, 128, 256)]
            assert max(per_token) < 1.01 * min(per_token)
    assert largest(128, None) <= matching.SCORES


def test_a_token_of_length_zero_is_similar_to_nothing() -> None:
    tokens = random_tokens(63)
    tokens[:, 1] = 0  # a source
    tokens[:, 4] = 0  # a destination
    for ratio in (0.1, 0.5, 0.75):
        assert_matches_naive(tokens, (7, 9, 2, 2), ratio, None)


def test_another_seed_is_another_choice_of_destinations() -> None:
    constant = torch.ones(1, 64, 4)
    slots = {tuple(matched(constant, (8, 8, 2, 2), 0.25, seed).slot[0].tolist()) for seed in SEEDS}
    assert len(slots) == len(SEEDS)


# Properties, over grids and tokens that nobody chose.


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Grid, float, int | None, int | None]:
    """Tokens with duplicates, all equal at the extreme, on any grid; some are zero."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sx, sy = draw(st.sampled_from([(2, 2), (1, 2), (2, 1), (3, 2), (2, 3), (4, 4)]))
    ratio = draw(st.floats(0, 1)) * (1 - 1 / (sx * sy))
    distinct = draw(st.integers(1, height * width))
    palette = random_tokens(distinct, channels=draw(st.integers(1, 5)), dtype=torch.float32)[0]
    palette[: draw(st.integers(0, 2))] = 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pick = torch.randint(distinct, (draw(st.integers(1, 3)), height * width), generator=generator)
    seed, tile = draw(st.none() | st.integers(0, 2**32 - 1)), draw(st.none() | st.integers(max(sx, sy), 6))
    return palette[pick], (height, width, sx, sy), ratio, seed, tile


Case = tuple[Tensor, Grid, float, int | None, int | None]
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(cases())
def test_a_merge_keeps_k_tokens_unmerged_ones_exactly_and_ties_and_zeros_are_harmless(case: Case) -> None:
    tokens, grid, ratio, seed, tile = case
    height, width, sx, sy = grid
    batch, count, channels = tokens.shape
    slots = match(tokens, grid, ratio, seed, tile)
    if height < sy or width < sx:
        assert slots is None
        assert ops.merge(tokens, slots) is tokens
        assert ops.unmerge(tokens, slots) is tokens
        return
    assert slots is not None
    kept = assert_slot_map(slots.slot, count, ratio, batch)
    for places, order, start in zip(slots.slot.flatten().split(count), slots.order, slots.start, strict=True):
        assert torch.equal(places.sort(stable=True).indices, order - order.min())
        assert (start - start[0]).tolist() == [sum(place < k for place in places.tolist()) for k in range(kept)]
    merged = ops.merge(tokens, slots)
    restored = ops.unmerge(merged, slots)
    assert (merged.shape, restored.shape) == ((batch, kept, channels), tokens.shape)
    assert merged.isfinite().all()
    for image, result, places in zip(tokens, restored, slots.slot.tolist(), strict=True):
        for token, place in enumerate(places):
            group = image[[other == place for other in places]]
            if len(group) == 1:
                assert torch.equal(result[token], image[token]), "a token that stayed alone has changed"
            slack = len(group) * torch.finfo(tokens.dtype).eps * group.abs().sum(0) / len(group)
            assert ((result[token] - group.double().mean(0)).abs() <= slack).all()


@many
@given(cases(), st.integers(-8, 8))
def test_a_constant_image_is_left_exactly_as_it_is(case: Case, value: int) -> None:
    tokens, grid, ratio, seed, tile = case
    constant = torch.full_like(tokens, value)
    slots = match(constant, grid, ratio, seed, tile)
    assert torch.equal(ops.unmerge(ops.merge(constant, slots), slots), constant)


@many
@given(cases(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(1, 81))
def test_a_token_that_is_not_finite_leaves_the_slot_map_whole_and_spoils_its_slot_alone(
    case: Case, value: float, number: int
) -> None:
    tokens, grid, ratio, seed, tile = case
    tokens[0, :number] = value
    slots = match(tokens, grid, ratio, seed, tile)
    if slots is None:
        return
    kept = assert_slot_map(slots.slot, tokens.shape[1], ratio, tokens.shape[0])
    merged = ops.merge(tokens, slots)
    for image, means, places in zip(tokens, merged, slots.slot.tolist(), strict=True):
        for place in range(kept):
            group = image[[other == place for other in places]]
            assert means[place].isfinite().all() == group.isfinite().all()


@pytest.mark.parametrize("ratio", [0, 0.0, 0.06])
def test_a_ratio_too_small_for_one_token_leaves_each_token_alone(ratio: float) -> None:
    tokens = random_tokens(16)
    slot, merged, restored = round_trip(tokens, (4, 4, 2, 2), ratio, 3)
    assert assert_slot_map(slot, 16, ratio, 2) == 16
    assert not torch.equal(merged, tokens)
    assert torch.equal(restored, tokens)


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_match_does_not_depend_on_how_long_the_tokens_are(dtype: torch.dtype) -> None:
    """At 6e4 a sum of squares is far beyond float16, and a similarity of NaN would merge whatever comes first."""
    tokens = random_tokens(63, dtype=torch.float64)
    tokens = (tokens / tokens.abs().max() * 6e4).to(dtype)
    assert tokens.isfinite().all()
    assert tokens.abs().max() > 5.9e4
    slot = matched(tokens, (7, 9, 2, 2), 0.5).slot
    assert_slot_map(slot, 63, 0.5, 2)
    assert torch.equal(slot, matched(tokens * 2.0**-8, (7, 9, 2, 2), 0.5).slot)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_keeps_the_dtype_and_errs_at_most_twice_as_much_as_a_sum_in_it(dtype: torch.dtype, device: str) -> None:
    for seed in range(4):
        tokens = random_tokens(63, seed=seed, dtype=dtype)
        slot, merged, restored = round_trip(tokens.to(device), (7, 9, 2, 2), 0.6, seed)
        assert merged.dtype == restored.dtype == dtype
        kept = merged.shape[1]
        exact = torch.tensor(
            [naive_merge(i, s, kept) for i, s in zip(tokens.tolist(), slot.tolist(), strict=True)], dtype=torch.float64
        )
        plain = torch.zeros(2, kept, 6, dtype=dtype)
        for b, places in enumerate(slot.tolist()):
            for token, place in enumerate(places):
                plain[b, place] += tokens[b, token]
            plain[b] /= torch.tensor([places.count(k) for k in range(kept)], dtype=dtype)[:, None]
        error = (merged.cpu().double() - exact).abs().max()
        assert error <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_match_chooses_as_well_as_scores_in_that_dtype_can(dtype: torch.dtype, device: str) -> None:
    """Whoever chooses by scores that are off by at most e picks one at most 2 e worse than the best."""
    grid = (7, 9, 2, 2)
    cells = naive_destinations(grid, 5)
    for seed in range(4):
        tokens = random_tokens(63, channels=16, seed=seed, dtype=dtype)
        unit = nn.functional.normalize(tokens.double(), dim=-1)
        low = tokens / tokens.norm(dim=-1, keepdim=True)  # tomesd's way, in this dtype
        scores = unit @ unit[:, cells].mT
        slack = 2 * ((low @ low[:, cells].mT).double() - scores).abs().max()
        slot = matched(tokens.to(device), grid, 0.5, 5).slot.cpu()
        for image, places in zip(scores, slot.tolist(), strict=True):
            sources = [token for token in range(63) if token not in cells]
            joined = [token for token in sources if places[token] < len(cells)]
            assert len(joined) == 31
            for token in joined:
                assert image[token, places[token]] >= image[token].max() - slack
            alone = image[sorted(set(sources) - set(joined))].max(-1).values
            assert image[joined].max(-1).values.min() >= alone.max() - slack


def test_a_mean_is_finite_where_the_sum_does_not_fit_in_the_dtype() -> None:
    tokens = torch.full((1, 4, 8), 6e4, dtype=torch.float16)
    assert torch.equal(ops.merge(tokens, matched(tokens, (2, 2, 2, 2), 0.75)), tokens[:, :1])


def test_float64_tokens_are_compared_in_float64() -> None:
    """Two cells of a 2 x 4 grid, whose destinations differ by less than float32 can tell."""
    angles = torch.tensor([[0.1 + 1e-10, 0, 0.1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    slot = matched(torch.stack([angles.cos(), angles.sin()], dim=-1), (2, 4, 2, 2), 0.75).slot
    assert slot.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("ratio", [0.1, 0.6, 0.75])
def test_weights_are_repeated_for_heads_and_lie_in_memory_as_kernels_of_attention_ask(ratio: float, heads: int) -> None:
    tokens = random_tokens(63)
    slots = matched(tokens, (7, 9, 2, 2), ratio)
    weights, of_images = ops.log_sizes(tokens, slots, heads), ops.log_sizes(tokens, slots)
    assert weights is not None
    assert of_images is not None
    assert torch.equal(weights, of_images.repeat_interleave(heads, dim=0))
    assert weights.stride(2) == 1
    assert weights.stride(0) % 8 == weights.stride(1) % 8 == 0


def test_one_slot_of_all_tokens_weighs_as_many() -> None:
    tokens = random_tokens(4, batch=1)
    weights = ops.log_sizes(tokens, matched(tokens, (2, 2, 2, 2), 0.75))
    assert weights is not None
    assert weights.tolist() == [[[math.log(4)]]]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_key_with_the_log_of_its_slots_size_is_attended_to_as_all_of_its_tokens_are(
    seed: int | None, ratio: float
) -> None:
    tokens = random_tokens(63)
    slots = matched(tokens, (7, 9, 2, 2), ratio, seed)
    merged = ops.merge(tokens, slots)
    everywhere = ops.unmerge(merged, slots)  # the mean in the place of each token
    weights = ops.log_sizes(tokens, slots)
    assert weights is not None
    attended = F.scaled_dot_product_attention(merged, merged, merged, attn_mask=weights)
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(merged, everywhere, everywhere))
    assert not torch.allclose(attended, F.scaled_dot_product_attention(merged, merged, merged))


def test_sizes_are_of_the_tokens_dtype_and_there_are_none_without_a_slot_map() -> None:
    for dtype in DTYPES:
        tokens = random_tokens(63, dtype=dtype)
        sizes = ops.log_sizes(tokens, matched(tokens, (7, 9, 2, 2), 0.75, None))
        assert sizes is not None
        assert (sizes.dtype, sizes.shape) == (dtype, (2, 1, 16))
        torch.testing.assert_close(sizes.exp().sum(-1), torch.full((2, 1), 63, dtype=dtype), rtol=0.02, atol=0)
    assert ops.log_sizes(tokens, None) is None


# What is run: one gather, gradients, no chance.


def test_unmerge_is_one_gather() -> None:
    tokens = random_tokens(63)
    slots = matched(tokens, (7, 9, 2, 2), 0.5, 3)
    merged = ops.merge(tokens, slots)
    with Recorder() as recorder:
        ops.unmerge(merged, slots)
    assert recorder.names == ["_to_copy", "gather"]  # which takes indices of 64 bits alone


def test_merge_and_unmerge_have_the_gradients_of_their_formulas() -> None:
    tokens = random_tokens(12, channels=2).requires_grad_()
    slots = matched(tokens, (3, 4, 2, 2), 0.5, 3)
    assert not any(tensor.requires_grad for tensor in slots)
    merged = ops.merge(tokens, slots)
    assert torch.autograd.gradcheck(lambda x: ops.merge(x, slots), (tokens,))
    assert torch.autograd.gradcheck(lambda y: ops.unmerge(y, slots), (merged.detach().requires_grad_(),))


def test_nothing_is_saved_for_a_backward_pass_through_the_match() -> None:
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        matched(random_tokens(12).requires_grad_(), (3, 4, 2, 2), 0.5)
    assert not saved


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("deterministic_algorithms")
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    """Slot map, merged tokens, restored tokens and gradient; large slots, so that an order of addition would show."""
    tokens = random_tokens(24 * 20, channels=32, dtype=dtype).to(device)
    tokens[:, 100:] = tokens[:, 99:100] + 1e-2 * tokens[:, 100:]
    tokens.requires_grad_()
    runs = []
    for _ in range(2):
        results = round_trip(tokens, (24, 20, 2, 2), 0.7, 1)
        (gradient,) = torch.autograd.grad(results[-1].square().sum(), tokens)
        runs.append([*results, gradient])
    sizes = [places.count(place) for places in runs[0][0].tolist() for place in set(places)]
    assert max(sizes) > 20
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_no_random_number_is_drawn(device: str) -> None:
    tokens = random_tokens(64).to(device)
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    round_trip(tokens, (8, 8, 2, 2), 0.5, 3)
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device == "cuda" else [])]
    assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))


# Compilers.


class Sites(nn.Module):
    """Several merges in one function: other grids, other strides, other seeds."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            *round_trip(x, (7, 9, 2, 2), 0.4, 3),
            ops.log_sizes(x, matched(x, (7, 9, 2, 2), 0.4, 3), 2),  # type: ignore[return-value]
            *round_trip(x, (7, 9, 2, 2), 0.4, None),
            *round_trip(y, (6, 8, 2, 3), 0.7, 2**32 - 1),
            *round_trip(x, (7, 9, 2, 2), 0.4, 3, 4),
            *round_trip(y, (6, 8, 2, 2), 0.4, 3, 4),
            *along(y),
        )


def along(tokens: Tensor) -> ops.SlotMap:
    """Tokens of a line that runs backwards."""
    line = torch.arange(tokens.shape[1] - 1, -1, -1)
    slots = ops.match_along(tokens, line, 1, tokens.shape[1], kept=30, sx=4, sy=1, seed=3, tile=16)
    assert slots is not None
    return slots


def site_inputs() -> tuple[Tensor, Tensor]:
    return random_tokens(63, dtype=torch.float32), random_tokens(48, seed=1, dtype=torch.float32)


def assert_same_results(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same slot maps; merged tokens to rounding, as a compiler may sum in an order of its own."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-6 if e.is_floating_point() else 0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_slot_maps_are_the_eager_ones(backend: str) -> None:
    compiled = torch.compile(Sites(), backend=backend, fullgraph=True)
    assert_same_results(compiled(*site_inputs()), Sites()(*site_inputs()))


def site_of_any_size(image: Tensor, ratio: str | Tensor, tile: int | None) -> tuple[Tensor, ...]:
    """What a graph makes of the tokens of an image, without numbers from outside of it."""
    height, width = ops.grid_of(image)
    tokens = image.flatten(2).mT
    slots = ops.match(tokens, height, width, kept=ops.kept(height, width, ratio), sx=2, sy=2, seed=3, tile=tile)
    return ops.unmerge(ops.merge(tokens, slots), slots), ops.log_sizes(tokens, slots, 2)  # type: ignore[return-value]


@pytest.mark.parametrize(("height", "width"), [(16, 20), (7, 9), (33, 47), (32, 32)])
@pytest.mark.parametrize("tile", [4, 6, 16, 32])
def test_tiles_laid_out_for_a_symbolic_size_give_the_slot_map_of_a_known_one(
    tile: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(2, 6, height, width, dtype=torch.float64)
    expected = site_of_any_size(image, "0.5", tile)
    monkeypatch.setattr(tiling, "_is_known", lambda size: False)
    assert_same_results(site_of_any_size(image, "0.5", tile), expected)


BOUNDS = {"min": 4, "max": 64}  # of a dynamic size


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("times, bounds", [(1, {}), (2, BOUNDS), *slow((1, BOUNDS), (2, {}), (8, {}), (8, BOUNDS))])
def test_a_tile_of_a_symbolic_size_has_a_number_of_places(times: int, bounds: dict[str, int]) -> None:
    shapes: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        products = [node for node in graph.graph.nodes if node.target is operator.matmul]
        shapes.extend(node.meta["example_value"].shape for node in products)
        return graph

    def site(image: Tensor) -> Any:
        larger = image.repeat_interleave(times, 2).repeat_interleave(times, 3)
        return site_of_any_size(larger, "0.5", 16)  # an argument would be a symbol too

    image = torch.randn(2, 6, 16, 20)
    for side in (2, 3):
        torch._dynamo.mark_dynamic(image, side, **bounds)
    torch.compile(site, backend=backend, fullgraph=True)(image)
    ((_, tiles, sources, destinations),) = shapes
    assert [isinstance(size, int) for size in (tiles, sources, destinations)] == [False, True, True]
    assert (sources, destinations) == (18 * 18 - 81, 81)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("tile", [pytest.param(None, marks=pytest.mark.slow), 16])
def test_one_graph_serves_all_sizes_those_of_one_tile_and_of_several(tile: int | None, counter: Any) -> None:
    compiled = torch.compile(site_of_any_size, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((16, 20), (7, 9), (33, 47)):
        image = torch.randn(2, 6, height, width)
        assert_same_results(compiled(image, "0.5", tile), site_of_any_size(image, "0.5", tile))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("tile", [None, 6])
def test_one_graph_serves_all_ratios(tile: int | None, counter: Any) -> None:
    compiled, image = torch.compile(site_of_any_size, backend=counter, fullgraph=True), torch.randn(2, 6, 16, 20)
    for ratio in (0.5, 0.25, 0.75, 0.1, 0.0):
        read = ops.as_read(ratio, dynamic=True)
        assert_same_results(compiled(image, read, tile), site_of_any_size(image, read, tile))
    assert counter.frame_count == 1


def assert_static(graph: fx.Graph) -> None:
    """No operation of a traced graph has a shape that depends on data, a draw, or a sum in no fixed order."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target.overloadpacket.__name__.rstrip("_")
            assert name not in FORBIDDEN, f"{name} is in the graph"
            if name in ("index", "index_put"):
                for place in node.args[1]:
                    assert place is None or place.meta["val"].dtype in (torch.int32, torch.int64), "indexed with a mask"
            if name == "index_put":
                assert not any(node.args[3:]), "index_put adds up"


@pytest.fixture(params=[False, True], ids=["sorts", "counts"])
def counts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that sorts, as a CPU does, and one that is made to count."""
    monkeypatch.setattr(matching, "_is_counted", lambda values, above=0: request.param)


@pytest.mark.usefixtures("counts")
def test_no_shape_depends_on_data_when_traced_with_fake_tensors() -> None:
    graph = make_fx(Sites(), tracing_mode="fake")(*site_inputs()).graph
    assert_static(graph)
    with FakeTensorMode() as mode:
        fakes = Sites()(*(mode.from_tensor(tensor) for tensor in site_inputs()))
    assert [fake.shape for fake in fakes] == [real.shape for real in Sites()(*site_inputs())]


@pytest.mark.parametrize("height, width, tile", [(8, 8, None), (8, 8, 4), (13, 19, None), (13, 19, 4)])
def test_slots_are_found_in_what_is_written(height: int, width: int, tile: int | None) -> None:
    """Inductor of torch 2.11, on a GPU, cannot search a view of what it has not written yet."""
    match = functools.partial(ops.match, height=height, width=width, kept=32, sx=2, sy=2, seed=1, tile=tile)
    graph = make_fx(match, tracing_mode="fake")(random_tokens(height * width)).graph
    (searched,) = (node.args[0] for node in graph.nodes if node.target is torch.ops.aten.searchsorted.Tensor)
    viewed: Any = searched
    while viewed.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        viewed = viewed.args[0]
    if viewed is not searched:  # else it is written for the search
        sort, place = viewed.args
        assert (sort.target, place) == (torch.ops.aten.sort.stable, 0)


def test_torch_export_takes_the_operations_whole() -> None:
    exported = torch.export.export(Sites(), site_inputs())
    assert_static(exported.graph)
    assert_same_results(exported.module()(*site_inputs()), Sites()(*site_inputs()))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.rand(2),
        lambda x: x.scatter_reduce(0, torch.zeros(2, dtype=torch.int64), x, "mean"),
    ],
)
def test_the_check_for_static_graphs_sees_what_it_is_for(function: Callable[[Tensor], Tensor]) -> None:
    graph = make_fx(function)(torch.ones(2)).graph
    with pytest.raises(AssertionError, match=r"is in the graph|indexed with a mask"):
        assert_static(graph)
