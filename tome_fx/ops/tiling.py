"""Which token of the grid lies where in which tile: integer arithmetic on the grid, without data.

NOTE [Tiles]
Tokens are compared and ranked within tiles of the grid, so that the work grows with N and not with its square, and each
problem is a small one of a batch. The cells of the grid, one destination each, are dealt out to the tiles as evenly as
they can be: along a side, tiles differ by one cell at most, and the last one also has the tokens beyond the last whole
cell. So no tile is a narrow strip, each has a destination, and the destinations are those of a search over the whole
grid, which is one tile.

All tiles are laid out as the largest would be: a place for each destination, then one for each other token. Places
that a tile has no token for repeat its first destination. What is most similar to one of those is most similar to it,
and writing something down for a token twice is writing it once.

NOTE [How many merge in each tile]
N - K tokens are merged in all. Of these the first tiles, of c tokens, have their share rounded down, c * (N - K) // N,
for any number of tiles. So each tile merges its own share to within one token, and all of them exactly N - K.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tome_fx.plan import Side, scramble


class Tiles(NamedTuple):
    """How a grid of N tokens is cut into T tiles of at most D destinations and S other tokens; see NOTE [Tiles].

    Args:
        destination: int64 `[T, D]`, tokens in `[0, N)`, in the order of their cells.
        source: int64 `[T, S]`, the other tokens.
        cells: int64 `[T, 1]`, how many destinations a tile has; its further places repeat the first.
        tokens: int64 `[T, 1]`, how many tokens it has.
        before: int64 `[T, 1]`, how many tokens all tiles before it have.
    """

    destination: Tensor
    source: Tensor
    cells: Tensor
    tokens: Tensor
    before: Tensor


def _start(side: Side, tile: Tensor) -> Tensor:
    """The first token of a tile along a side; the side's size for the number after the last tile's."""
    cell = tile * side.each + tile.clamp(max=side.more)
    return cell * side.stride + tile // side.tiles * (side.size % side.stride)


def tiles(height: int, width: int, sx: int, sy: int, tile: int | None, seed: int | None, device: torch.device) -> Tiles:
    """Cut a grid with at least one whole cell into tiles: a pure function of the grid and the seed.

    Args:
        height: Rows of the token grid.
        width: Columns of the token grid.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        tile: Side of a tile, in tokens, at least a cell's; None for one tile of the whole grid.
        seed: Chooses the destination in each cell, pseudo-randomly; None takes the top left of every cell.
        device: Of the result.
    """
    down, right = Side.of(height, sy, tile), Side.of(width, sx, tile)
    most = down.most * right.most

    number = torch.arange(down.tiles * right.tiles, device=device)[:, None]
    row, column = number // right.tiles, number % right.tiles
    top, left = _start(down, row), _start(right, column)
    tall, wide = _start(down, row + 1) - top, _start(right, column + 1) - left  # of the tile, in tokens
    rows, columns = tall // sy, wide // sx  # and in whole cells
    cells, tokens = rows * columns, tall * wide

    place = torch.arange(down.longest * right.longest, device=device)
    own = torch.where(place < most, place < cells, place - most < tokens - cells)
    index = torch.where(place < most, place, place - most + cells) * own

    # The destinations of the tile come first, then the other tokens of its cells, one of each cell after another,
    # then those right of its last whole cell, then those below it.
    turn, cell = index // cells, index % cells
    cell_y, cell_x = cell // columns, cell % columns
    of_grid = (top // sy + cell_y) * (width // sx) + left // sx + cell_x
    first = 0 if seed is None else scramble(of_grid + seed)
    inside = (turn + first) % (sx * sy)
    y, x = cell_y * sy + inside // sx, cell_x * sx + inside % sx

    margin, beside = (wide - columns * sx).clamp(min=1), index - cells * (sx * sy)
    y = torch.where(beside < 0, y, beside // margin)
    x = torch.where(beside < 0, x, columns * sx + beside % margin)

    is_below = index >= rows * sy * wide
    y = torch.where(is_below, index // wide, y)
    x = torch.where(is_below, index % wide, x)
    token = (top + y) * width + left + x
    return Tiles(token[:, :most], token[:, most:], cells, tokens, top * width + left * tall)
