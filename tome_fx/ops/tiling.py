"""Which token of the grid lies where in which tile: integer arithmetic on the grid, without data.

NOTE [Tiles]
Tokens are compared and ranked within tiles of the grid, so that the work grows with N and not with its square, and each
problem is a small one of a batch. The cells of the grid, one destination each, are dealt out to the tiles as evenly as
they can be: along a side, tiles differ by one cell at most, and the last one also has the tokens beyond the last whole
cell. So no tile is a narrow strip, each has a destination, and the destinations are those of a search over the whole
grid, which is one tile.

All tiles are laid out alike, as whole cells, as many as the largest has or has begun. What a tile lacks of that are
gaps. Its P tokens have a position, in the order of rows, and a place: one for the destination of each cell, then one
round after another of one further token of each cell. A cell that is not whole has no last token. Its rounds begin with
that gap, where the destination of a whole one would be, and so all of its tokens are sources.

NOTE [How many merge in each tile]
N - K tokens are merged in all. Of these the first tiles, of c tokens, have their share rounded down, c * (N - K) // N,
for any number of tiles. So each tile merges its own share to within one token, and all of them exactly N - K.

NOTE [What is alike is a number]
What all tiles have in common is a number, and a tensor of one for each tile only where they differ, or may because
sizes are symbolic. A compiler folds numbers into its kernels, and may need kernels of their own for tensors.

A symbolic number of tiles is one more than there are, of which the last repeats the one before and is read by nobody.
For torch makes a graph of its own for a size of 1, and so one graph serves one tile and several.

NOTE [Room where a size is symbolic]
How many cells the largest tile has is a long expression of a symbolic size, and every index of every kernel would hold
it: Inductor took minutes to simplify those of one match. So where a size is symbolic all tiles are laid out with as
many cells as any could have, a number. What that adds are gaps, and the slot map is the same.

NOTE [Written down once]
What is cheap to compute, Inductor computes again wherever it is read. That is no gain where the expression is long: it
doubles with each of its values that is read twice, as those of a hash are, and has to be compiled. A view of memory by
its strides needs memory, so that a tensor seen by its own strides is the same, but computed and written down once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tome_fx.plan import Side, scramble


@dataclass  # and no tuple: dynamo traces no property of one before torch 2.12
class Tiles:
    """How a grid of N tokens is cut into T tiles of P places in D cells, gaps included; see NOTE [Tiles].

    What is said of each tile is `[T, 1]`, or an int: see NOTE [What is alike is a number].

    Args:
        down: How the height of the grid is cut.
        right: How its width is.
        rows: `[down.tiles + 1]`, the first row of each tile, and the height.
        columns: `[right.tiles + 1]`, the first column of each tile, and the width.
        top: Row of a tile's first token.
        left: Column of a tile's first token.
        tall: Rows of a tile.
        wide: Columns of a tile.
        first: `[T, D]`, which of its tokens begins a cell's rounds, numbered by rows; the others follow in turn.
    """

    down: Side
    right: Side
    rows: Tensor
    columns: Tensor
    top: Tensor
    left: Tensor
    tall: Tensor | int
    wide: Tensor | int
    first: Tensor

    @classmethod
    def of(
        cls, height: int, width: int, sx: int, sy: int, tile: int | None, seed: int | None, device: torch.device
    ) -> "Tiles":
        """Cut a grid with at least one whole cell into tiles: a pure function of the grid and the seed.

        Args:
            height: Rows of the token grid.
            width: Columns of the token grid.
            sx: Width of a cell, in tokens.
            sy: Height of a cell, in tokens.
            tile: Side of a tile, in tokens, at least a cell's; None for one tile of the whole grid.
            seed: Chooses the destination in each cell, pseudo-randomly; None takes the top left of every cell.
            device: Of all tensors.
        """
        # See NOTE [Room where a size is symbolic].
        down, right = (
            Side.of(size, stride, tile, roomy=not _is_known(size)) for size, stride in ((height, sy), (width, sx))
        )
        rows, columns = _edges(down, device), _edges(right, device)
        number = _tile_numbers(down.tiles * right.tiles, device)[:, None]
        top, tall = _cut(down, rows, number // right.tiles)
        left, wide = _cut(right, columns, number % right.tiles)

        row, column = _numbers(down.most, right.most, device=device)
        cell = (top // sy + row) * (width // sx) + left // sx + column  # of the grid, for a choice whatever the tiles
        first = torch.zeros_like(cell) if seed is None else scramble(cell + seed) % (sx * sy)
        if not (_alike(down) and _alike(right)):
            first = torch.where((row < tall // sy) & (column < wide // sx), first, sx * sy - 1)
        return cls(down, right, rows, columns, top, left, tall, wide, once(first))

    @property
    def alike(self) -> bool:
        """Whether all tiles are known to be of one size, and without gaps."""
        return _alike(self.down) and _alike(self.right)

    @property
    def destinations(self) -> int:
        """D, the places for destinations."""
        return self.down.most * self.right.most

    @property
    def places(self) -> int:
        """P, all places."""
        return self.down.longest * self.right.longest

    @property
    def cells(self) -> Tensor | int:
        """Whole cells of a tile, each of which gives a destination."""
        return (self.tall // self.down.stride) * (self.wide // self.right.stride)

    @property
    def tokens(self) -> Tensor | int:
        """Tokens of a tile."""
        return self.tall * self.wide

    @property
    def before(self) -> Tensor:
        """Tokens of all tiles before a tile."""
        return self.top * self.right.size + self.left * self.tall

    @property
    def token_of_place(self) -> Tensor:
        """The token of the grid at each place of each tile, `[T, P]`, negative at a gap."""
        sy, sx = self.down.stride, self.right.stride
        turn, row, column = _numbers(sy * sx, self.down.most, self.right.most, device=self.first.device)
        inside = (turn + self.first.repeat(1, sy * sx)) % (sy * sx)
        y, x = row * sy + inside // sx, column * sx + inside % sx
        return self._with_gaps((self.top + y) * self.right.size + self.left + x, y, x)

    @property
    def place_of_position(self) -> Tensor:
        """The place of the token at each position of each tile, `[T, P]`, negative at a gap."""
        sy, sx = self.down.stride, self.right.stride
        row, y, column, x = _numbers(self.down.most, sy, self.right.most, sx, device=self.first.device)
        cell = row * self.right.most + column
        turn = (y * sx + x - self.first.index_select(1, cell)) % (sy * sx)
        return self._with_gaps(turn * self.destinations + cell, row * sy + y, column * sx + x)

    def token_of_position(self, position: Tensor) -> Tensor:
        """The token of the grid at these positions of each tile, `[B, T, P]`."""
        return (self.top + position // self.right.longest) * self.right.size + self.left + position % self.right.longest

    def cell_of_place(self, place: Tensor) -> Tensor:
        """The number of a cell among the whole ones of its tile, at these places for destinations, `[..., T, P]`."""
        if _alike(self.right):
            return place
        return place // self.right.most * (self.wide // self.right.stride) + place % self.right.most

    def filled(self, values: Tensor, index: Tensor, filling: float) -> Tensor:
        """The values, and the filling where an index is that of a gap."""
        return values if self.alike else values.where(index >= 0, filling)

    def by_tiles(self, values: Tensor) -> Tensor:
        """Values `[B, T, P]` of the tokens of each tile, then of its gaps, as `[B, N]` of one tile after another."""
        if self.alike:
            return values.flatten(1)
        token = torch.arange(self.down.size * self.right.size, device=values.device)
        row = _tile(self.down, token // self.right.size)
        top, tall = _cut(self.down, self.rows, row)
        inside = token - top * self.right.size
        column = _tile(self.right, inside // tall)
        left, _ = _cut(self.right, self.columns, column)
        return self._taken(values, row, column, inside - left * tall)

    def by_rows(self, values: Tensor) -> Tensor:
        """Values `[B, T, P]` at the positions of each tile, as `[B, N]` in the order of the grid."""
        if self.alike:
            tiles = values.view(-1, self.down.tiles, self.right.tiles, self.down.longest, self.right.longest)
            return tiles.transpose(2, 3).flatten(1)
        token = torch.arange(self.down.size * self.right.size, device=values.device)
        y, x = token // self.right.size, token % self.right.size
        row, column = _tile(self.down, y), _tile(self.right, x)
        (top, _), (left, _) = _cut(self.down, self.rows, row), _cut(self.right, self.columns, column)
        return self._taken(values, row, column, (y - top) * self.right.longest + x - left)

    def _with_gaps(self, index: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """An index `[T, P]`, negative where a tile has no such row or column."""
        return index if self.alike else index.where((y < self.tall) & (x < self.wide), -1)

    def _taken(self, values: Tensor, row: Tensor, column: Tensor, inside: Tensor) -> Tensor:
        """Of `[B, T, P]` those at N places inside of the tiles in these rows and columns of tiles, `[B, N]`."""
        return values.flatten(1).index_select(1, (row * self.right.tiles + column) * self.places + inside)


def once(values: Tensor) -> Tensor:
    """The same values: see NOTE [Written down once]."""
    return values.as_strided(values.shape, values.stride())


def _is_known(size: int) -> bool:
    """Whether a size is known and not symbolic.

    What is known of a symbol are bounds, and what it is a multiple of, as of an upsampled grid: twos, not sevens. So
    what it leaves when it is divided by seven is known of a number alone.
    """
    return any(statically_known_true(size % 7 == rest) for rest in range(7))


def _tile_numbers(tiles: int, device: torch.device) -> Tensor:
    """The number of each tile, and of one more where there may be one: see NOTE [What is alike is a number]."""
    if statically_known_true(tiles == 1) or statically_known_true(tiles > 1):
        return torch.arange(tiles, device=device)
    return torch.arange(tiles + 1, device=device).clamp(max=tiles - 1)


def _numbers(*sizes: int, device: torch.device) -> list[Tensor]:
    """The numbers below each size in all combinations, the last changing fastest: `[product of the sizes]` each."""
    numbers = torch.meshgrid([torch.arange(size, device=device) for size in sizes], indexing="ij")
    return [number.flatten() for number in numbers]


def _alike(side: Side) -> bool:
    """Whether all tiles along a side are known to be of one length, and of whole cells."""
    return statically_known_true(side.tiles * side.longest == side.size)


def _edges(side: Side, device: torch.device) -> Tensor:
    """The first token of each tile along a side, and the side's size."""
    tile = torch.arange(side.tiles + 1, device=device)
    if _alike(side):
        return tile * side.longest
    cells = tile * side.each + tile.clamp(max=side.more)
    return once(cells * side.stride + tile // side.tiles * (side.size % side.stride))


def _cut(side: Side, edges: Tensor, tile: Tensor) -> tuple[Tensor, Tensor | int]:
    """The first token of these tiles along a side, and their lengths."""
    if _alike(side):
        return tile * side.longest, side.longest
    start = edges[tile]
    return start, edges[tile + 1] - start


def _tile(side: Side, token: Tensor) -> Tensor:
    """The tile of a token along a side."""
    if _alike(side):
        return token // side.longest
    cell = (token // side.stride).clamp(max=side.size // side.stride - 1)
    return torch.maximum(cell // (side.each + 1), (cell - side.more) // side.each)
