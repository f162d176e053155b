"""The contract of `tome_fx.ops.placing`: a slot stands where its destination does, tokens on a line stay neighbours.

Against loops over single tokens. A grid that is given by coordinates is merged as the grid itself where its sides are
whole tiles, and as exactly everywhere else; pictures are never mixed in a cell. Frames of a video never are in a tile,
and so cost no more than each by itself.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tome_fx import ops
from tome_fx.ops.tiling import Tiles

GRIDS = [(8, 8), (16, 32), (7, 9), (5, 4)]


def tokens(batch: int, count: int) -> Tensor:
    return torch.randn(batch, count, 6, generator=torch.Generator().manual_seed(0))


def coordinates(*pictures: tuple[int, int]) -> Tensor:
    """`[N, 3]`: picture, row and column of each token of pictures of these sizes."""
    found = [(i, y, x) for i, (height, width) in enumerate(pictures) for y in range(height) for x in range(width)]
    return torch.tensor(found)


def destinations_of(grid: Tiles) -> set[int]:
    """The tokens that sources may join."""
    return {token for token in grid.token_of_place[:, : grid.destinations].flatten().tolist() if token >= 0}


def slots_of(found: ops.SlotMap) -> list[set[frozenset[int]]]:
    """The tokens that share a slot, for each image."""
    return [
        {frozenset(torch.nonzero(slot == k).flatten().tolist()) for k in range(found.start.shape[1])}
        for slot in found.slot
    ]


@pytest.mark.parametrize("height, width", GRIDS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("tile", [None, 4])
def test_a_slot_stands_at_its_destination_or_at_its_only_token(
    height: int, width: int, seed: int | None, tile: int | None
) -> None:
    options: dict[str, Any] = {"sx": 2, "sy": 2, "seed": seed, "tile": tile}
    found = ops.match(tokens(2, height * width), height, width, kept=height * width // 2, **options)
    stands = ops.places(found, height, width, **options)
    assert found is not None
    assert stands is not None
    destinations = destinations_of(Tiles.of(height, width, 2, 2, tile, seed, found.slot.device))
    for slot, places in zip(found.slot.tolist(), stands.tolist(), strict=True):
        for k, place in enumerate(places):
            members = {token for token, own in enumerate(slot) if own == k}
            assert {place} == (members & destinations or members)
            assert len(members & destinations) == 1 or len(members) == 1


def test_where_nothing_is_merged_nothing_stands_for_anything() -> None:
    assert ops.places(None, 4, 4, sx=2, sy=2, seed=None) is None
    line = ops.line_of(coordinates((4, 4)), 2, 2)
    assert ops.match_along(tokens(1, 16), line, 1, 16, kept=None, sx=4, sy=1, seed=None) is None


@pytest.mark.parametrize("pictures", [[(4, 4)], [(5, 7)], [(4, 6), (5, 3)], [(1, 9)], [(3, 3), (3, 3), (3, 3)]])
@pytest.mark.parametrize("sx, sy", [(2, 2), (3, 1)])
def test_a_line_has_every_token_once_and_whole_cells_first(pictures: list[tuple[int, int]], sx: int, sy: int) -> None:
    ids = coordinates(*pictures)
    line = ops.line_of(ids + torch.tensor([2, 5, 7]), sx, sy)
    assert sorted(line.tolist()) == list(range(len(ids)))
    cells = [(int(i), int(y) // sy, int(x) // sx) for i, y, x in ids[line]]
    whole = sum((height // sy) * (width // sx) for height, width in pictures)
    for cell in range(whole):
        own = cells[cell * sx * sy : (cell + 1) * sx * sy]
        assert len(set(own)) == 1, "a cell has tokens of several"
    assert all(cells.count(cell) < sx * sy for cell in cells[whole * sx * sy :])


def test_a_line_knows_coordinates_of_half_precision_and_pictures_told_by_several_axes() -> None:
    ids = coordinates((6, 6), (4, 4))
    line = ops.line_of(ids, 2, 2)
    assert torch.equal(ops.line_of(ids.bfloat16(), 2, 2), line)
    two = torch.cat([ids[:, :1] * 0, ids], dim=1)
    assert torch.equal(ops.line_of(two, 2, 2), line)


@pytest.mark.parametrize("tile", [None, 4, 8])
def test_a_grid_of_whole_tiles_is_merged_along_its_line_as_it_is_by_itself(tile: int | None) -> None:
    height, width, kept = 16, 24, 16 * 24 // 2
    image = tokens(2, height * width)
    shuffled = torch.randperm(height * width, generator=torch.Generator().manual_seed(1))
    line = ops.line_of(coordinates((height, width))[shuffled], 2, 2)
    along = None if tile is None else tile**2
    found = ops.match_along(image[:, shuffled], line, 1, height * width, kept=kept, sx=4, sy=1, seed=None, tile=along)
    expected = ops.match(image, height, width, kept=kept, sx=2, sy=2, seed=None, tile=tile)
    assert found is not None
    assert expected is not None
    own = [{frozenset(shuffled[list(slot)].tolist()) for slot in image} for image in slots_of(found)]
    assert own == slots_of(expected)


@pytest.mark.parametrize("pictures", [[(8, 8)], [(7, 9)], [(8, 8), (5, 6)]])
def test_what_is_merged_along_a_line_is_the_mean_of_each_slot_and_comes_back(pictures: list[tuple[int, int]]) -> None:
    ids = coordinates(*pictures)
    count = len(ids)
    image, line = tokens(2, count), ops.line_of(ids, 2, 2)
    options: dict[str, Any] = {"sx": 4, "sy": 1, "seed": 3, "tile": 16}
    found = ops.match_along(image, line, 1, count, kept=count - count // 2, **options)
    assert found is not None
    merged, back = ops.merge(image, found), ops.unmerge(ops.merge(image, found), found)
    for b, slots in enumerate(slots_of(found)):
        assert len(slots) == count - count // 2
        for slot in slots:
            torch.testing.assert_close(back[b, list(slot)], image[b, list(slot)].mean(0).expand(len(slot), -1))
    stands = ops.places(found, 1, count, line=line, **options)
    assert stands is not None
    assert torch.equal(found.slot.gather(1, stands), torch.arange(merged.shape[1]).expand(2, -1).int())
    destinations = destinations_of(Tiles.of(1, count, 4, 1, 16, 3, line.device))
    assert set(line[list(destinations)].tolist()) <= set(stands[0].tolist())


@pytest.mark.parametrize("height, width", GRIDS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("tile", [None, 4])
def test_no_tile_of_a_video_crosses_a_frame(height: int, width: int, seed: int | None, tile: int | None) -> None:
    frames, count = 3, height * width
    video = tokens(2, frames * count)
    options: dict[str, Any] = {"sx": 2, "sy": 2, "seed": seed, "tile": tile}
    found = ops.match_frames(video, frames, height, width, kept=count // 2, **options)
    stands = ops.places(found, height, width, frames=frames, **options)
    assert found is not None
    assert stands is not None
    assert [part.dtype for part in found] == 3 * [torch.int32]
    assert stands.shape == (2, frames * (count // 2))
    merged = ops.merge(video, found)
    torch.testing.assert_close(ops.merge(ops.unmerge(merged, found), found), merged)
    for frame in range(frames):
        part = video[:, frame * count : (frame + 1) * count]
        own = ops.match(part, height, width, kept=count // 2, **options)
        assert own is not None
        mine = slice(frame * (count // 2), (frame + 1) * (count // 2))
        assert torch.equal(found.slot[:, frame * count : (frame + 1) * count], own.slot + mine.start)
        assert torch.equal(merged[:, mine], ops.merge(part, own))
        standing = ops.places(own, height, width, **options)
        assert standing is not None
        assert torch.equal(stands[:, mine] - frame * count, standing)


def test_a_video_of_more_frames_is_matched_with_work_and_memory_in_proportion() -> None:
    def work(frames: int) -> tuple[int, int]:
        sizes: list[int] = []

        class Largest(TorchDispatchMode):
            """Notes the size of each result."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                sizes.extend(one.numel() for one in pytree.tree_leaves(result) if isinstance(one, Tensor))
                return result

        largest: Any = Largest
        with FlopCounterMode(display=False) as counter, largest():
            ops.match_frames(tokens(1, frames * 64), frames, 8, 8, kept=32, sx=2, sy=2, seed=None)
        return counter.get_total_flops(), max(sizes)

    (flops, most), (of_more, most_of_more) = work(2), work(6)
    assert (of_more, most_of_more) == (3 * flops, 3 * most)


def test_a_video_whose_sides_are_not_those_of_its_tokens_is_an_error_in_words() -> None:
    options: dict[str, Any] = {"sx": 2, "sy": 2, "seed": None}
    assert ops.match_frames(tokens(1, 60), 0, 0, 0, kept=None, **options) is None
    assert ops.match_frames(tokens(1, 6), 6, 1, 1, kept=1, **options) is None
    with pytest.raises(ValueError, match="60 tokens are not those of 3 frames of 4 x 4, the grid"):
        ops.match_frames(tokens(1, 60), 3, 4, 4, kept=8, **options)


def test_a_line_that_is_not_of_the_tokens_is_an_error_in_words() -> None:
    line, options = torch.arange(72), {"kept": 36, "sx": 2, "sy": 1, "seed": None}
    with pytest.raises(ValueError, match="64 tokens, but the model is given the places of 72: give"):
        ops.match_along(tokens(1, 64), line, 1, 72, **options)  # type: ignore[arg-type]


def test_text_before_the_grid_is_alone_in_its_slots() -> None:
    x, text = tokens(2, 64), tokens(2, 5) + 1
    found = ops.match(x, 8, 8, kept=20, sx=2, sy=2, seed=3)
    joined = ops.after_text(found, text)
    assert joined is not None
    assert [part.dtype for part in joined] == 3 * [torch.int32]
    sequence = torch.cat([text, x], dim=1)
    merged = ops.merge(sequence, joined)
    assert torch.equal(merged, torch.cat([text, ops.merge(x, found)], dim=1))
    expected = torch.cat([text, ops.unmerge(ops.merge(x, found), found)], dim=1)
    assert torch.equal(ops.unmerge(merged, joined), expected)
    assert ops.after_text(None, text) is None


@pytest.mark.parametrize("count, kept", [(5, 20), (4, 20), (3, 20), (5, 19)])
def test_weights_after_text_are_none_for_the_text_and_lie_in_memory_as_masks_must(count: int, kept: int) -> None:
    x, text = tokens(2, 64), tokens(2, count)
    found = ops.match(x, 8, 8, kept=kept, sx=2, sy=2, seed=3)
    for dtype in (torch.float32, torch.float16):
        weights = ops.log_sizes(text.to(dtype), found, before=text.shape[1])
        own = ops.log_sizes(x.to(dtype), found)
        assert weights is not None
        assert own is not None
        assert torch.equal(weights, torch.cat([torch.zeros(2, 1, count, dtype=dtype), own], dim=2))
        assert weights.stride(0) % 8 == 0
    assert ops.log_sizes(text, None, before=text.shape[1]) is None
