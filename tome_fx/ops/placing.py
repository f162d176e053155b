"""Where on the grid merged tokens stand, grids that are known by their tokens' coordinates alone, and those of videos.

NOTE [Tokens on a line]
Some models are told where their tokens lie by a table of coordinates. That is data, and so no side of a grid can be a
shape. Their tokens are put on a line on which neighbours are neighbours on the picture, and the line is matched as a
grid of one row: as many tokens in a row as a cell has are a cell, as many as a tile has are a tile.

The line goes through one picture after another, in each along a Z-order curve over its whole cells, and last through
the tokens that lie in no whole cell. Where sides are whole tiles of a power of two of cells, the line's tiles are those
of the grid. Elsewhere they are as large and as coherent, and where the sizes of pictures are no multiple of a tile's, a
tile holds the end of one and the beginning of the next.

Source of the curve: Morton, "A Computer Oriented Geodetic Data Base and a New Technique in File Sequencing" (1966).
"""

import torch
from torch import Tensor

from tome_fx.ops.matching import SlotMap, match
from tome_fx.ops.tiling import Tiles
from tome_fx.plan import OR_MERGE_NOTHING


def line_of(coordinates: Tensor, sx: int, sy: int) -> Tensor:
    """The order of tokens along a line; see NOTE [Tokens on a line].

    Args:
        coordinates: `[N, axes]`, whole numbers of any type. The last two axes are row and column, in tokens; tokens
            that differ in one before these lie on different pictures.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.

    Returns:
        int64 `[N]`, the tokens from the first to the last on the line.
    """
    *others, y, x = (coordinates - coordinates.amin(dim=0)).long().unbind(dim=1)
    picture = torch.zeros_like(x)
    for axis in others:
        picture = picture * (axis.amax() + 1) + axis
    cell = (picture << 32) + (_spread(y // sy) << 1) + _spread(x // sx)
    line = (cell * (sx * sy) + y % sy * sx + x % sx).argsort(stable=True)
    in_order = cell[line]
    found = torch.searchsorted(in_order, in_order, right=True) - torch.searchsorted(in_order, in_order)
    return line[(found != sx * sy).byte().argsort(stable=True)]


def _spread(number: Tensor) -> Tensor:
    """The lowest 16 bits of each number, a zero before each of them."""
    number = number & 0xFFFF
    for shift, bits in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        number = (number | number << shift) & bits
    return number


def match_along(
    tokens: Tensor,
    line: Tensor,
    height: int,
    width: int,
    *,
    kept: int | None,
    sx: int,
    sy: int,
    seed: int | None,
    tile: int | None = None,
) -> SlotMap | None:
    """As `match`, for tokens in any order: those of the line are matched as the tokens of a grid.

    Args:
        tokens: `[B, N, C]`.
        line: int64 `[N]`, the tokens in the row-major order of the grid.
        height, width, kept, sx, sy, seed, tile: Of `match`.

    Raises:
        ValueError: N is another number than the line has, or the batch is empty.
    """
    if kept is not None and tokens.shape[1] != line.shape[0]:
        raise ValueError(
            f"{tokens.shape[1]} tokens, but the model is given the places of {line.shape[0]}: give the true ones, "
            f"{OR_MERGE_NOTHING}"
        )
    slots = match(tokens.detach()[:, line], height, width, kept=kept, sx=sx, sy=sy, seed=seed, tile=tile)
    if slots is None:
        return None
    batch, count = slots.slot.shape
    image = torch.arange(batch, device=line.device)[:, None]
    # Inductor would fill what is scattered to in a kernel of its own.
    slot = torch.empty_like(slots.slot).index_put_((image, line), slots.slot)
    return SlotMap(slot, (line[slots.order - image * count] + image * count).int(), slots.start)


def match_frames(
    tokens: Tensor,
    frames: int,
    height: int,
    width: int,
    *,
    kept: int | None,
    sx: int,
    sy: int,
    seed: int | None,
    tile: int | None = None,
) -> SlotMap | None:
    """As `match`, for the tokens of a video: each frame is matched by itself, so that no tile has tokens of two.

    Args:
        tokens: `[B, N, C]`, with `N = frames * height * width`.
        frames: Frames, one after the other in the tokens.
        height, width, kept, sx, sy, seed, tile: Of `match`, for each frame.

    Returns:
        A slot map of N tokens to `frames * kept`.

    Raises:
        ValueError: N is another number, or the batch is empty.
    """
    if kept is None:
        return None
    batch, count = tokens.shape[:2]
    if count != frames * height * width:
        raise ValueError(
            f"{count} tokens are not those of {frames} frames of {height} x {width}, the grid that the model is given: "
            f"give the true one, beside coordinates as well, {OR_MERGE_NOTHING}"
        )
    each = tokens.detach().reshape(batch * frames, height * width, tokens.shape[2])
    slots = match(each, height, width, kept=kept, sx=sx, sy=sy, seed=seed, tile=tile)
    if slots is None:
        return None
    # What is numbered through all frames of the batch is so already: the order of the tokens and where slots begin.
    before = slots.start.shape[1] * torch.arange(frames, dtype=torch.int32, device=tokens.device)
    slot = slots.slot.view(batch, frames, -1) + before[:, None]
    return SlotMap(slot.flatten(1), slots.order.view(batch, -1), slots.start.view(batch, -1))


def places(
    slots: SlotMap | None,
    height: int,
    width: int,
    *,
    sx: int,
    sy: int,
    seed: int | None,
    tile: int | None = None,
    line: Tensor | None = None,
    frames: int | None = None,
) -> Tensor | None:
    """The token whose place on the grid each slot has: its destination, or the source that stays alone.

    Args:
        slots: From `match`, `match_along` or `match_frames`.
        height, width, sx, sy, seed, tile: As they were given there.
        line: As it was given to `match_along`.
        frames: As they were given to `match_frames`.

    Returns:
        int64 `[B, K]`, in `[0, N)`, or None where `slots` is None.
    """
    if slots is None:
        return None
    batch, count = slots.slot.shape
    grid = Tiles.of(height, width, sx, sy, tile, seed, slots.slot.device)
    destination = grid.token_of_place[:, : grid.destinations]
    destination = destination.where(destination >= 0, destination[:, :1]).flatten()  # at a gap the tile's first again
    if line is not None:
        destination = line[destination]
    if frames is not None:
        before = height * width * torch.arange(frames, device=slots.slot.device)
        destination = (destination + before[:, None]).flatten()
    row = count * torch.arange(batch, device=slots.slot.device)[:, None]
    first = slots.order.flatten()[slots.start] - row
    # Inductor writes a scatter of int32 itself, and leaves one of int64 to ATen.
    return first.int().scatter(1, slots.slot[:, destination].long(), destination.int().expand(batch, -1)).long()


def after_text(slots: SlotMap | None, text: Tensor) -> SlotMap | None:
    """The slot map of a sequence in which tokens of text stand before those of the grid, each of them a slot alone.

    Args:
        slots: From `match`, `match_along` or `match_frames`, of N tokens to K.
        text: `[B, T, C]`.

    Returns:
        A slot map of T + N tokens to T + K, the text's first, or None where `slots` is None.
    """
    if slots is None:
        return None
    batch, count = slots.slot.shape
    length = text.shape[1]
    alone = torch.arange(length, dtype=torch.int32, device=slots.slot.device).expand(batch, -1)
    row = torch.arange(batch, dtype=torch.int32, device=slots.slot.device)[:, None]

    def joined(of_grid: Tensor) -> Tensor:
        """Places among the text and the grid of one image, of places among the grid of one."""
        return torch.cat([alone, of_grid + length], dim=1)

    order, start = (joined(part - count * row) + (length + count) * row for part in (slots.order, slots.start))
    return SlotMap(joined(slots.slot), order, start)
