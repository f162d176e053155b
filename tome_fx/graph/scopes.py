"""What a pass is told of a model, as data: blocks that share a grid, and modules in them that see merged tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tome_fx.ops import SlotMap

# Of attention, tokens and their slot map: what it is to add to the scores of merged keys; None where it cannot.
Weigh = Callable[[nn.Module, Tensor, SlotMap | None], Tensor | None]


@dataclass(frozen=True)
class Matching:
    """How the blocks of a stack are matched, for `ops.match`.

    Args:
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Of the destinations.
        tile: Side of the tiles, in tokens; None for the whole grid.
        once: Match before the first block alone, and merge in every block by that slot map.
    """

    sx: int = 2
    sy: int = 2
    seed: int | None = None
    tile: int | None = None
    once: bool = False

    @property
    def along(self) -> "Matching":
        """The same of tokens on a line: NOTE [Tokens on a line]."""
        tile = None if self.tile is None else self.tile**2
        return replace(self, sx=self.sx * self.sy, sy=1, tile=tile)


@dataclass(frozen=True)
class Adapted:
    """An argument of a block that is another where tokens are merged, such as a table with a row for each of them.

    Args:
        name: Its name.
        made: What makes it, of the value that a block is given or None, the slot map, the places of the slots (from
            `ops.places`) and the values of `beside`. Without a slot map it returns the value itself. It is made once
            for all blocks that are given the same value under one slot map.
        beside: Names of other arguments that it is made of, as the first of these blocks is given them; not the
            tokens', which would be unmerged for it.
        chosen: What a block is given, made of the block, the value, and what was made of it, where that depends on the
            block; None for what was made.
    """

    name: str
    made: Callable[..., Any]
    beside: tuple[str, ...] = ()
    chosen: Callable[[nn.Module, Any, Any], Any] | None = None


@dataclass(frozen=True)
class Stack:
    """Blocks in a row that take and return the same tokens, and where their grid is known: what a pass for it needs.

    Args:
        blocks: Their names in the module that calls them.
        tokens: Name of a block's argument that holds the tokens `[B, N, C]`; by position it is the first.
        arguments: For each block, the names and default values of its positional arguments, in order, for calls through
            a function that passes positional arguments alone. None for a block that takes any number.
        grid_inputs: Names of the inputs of the calling module that show the grid.
        grid: What makes height and width of those inputs and of `grid_arguments`. Of tokens on a line it is one row.
        ratio: Path of the attribute of the calling module that holds the ratio, from `ops.as_read`.
        result: Place of the tokens in the tuple that a block returns; None where it returns them alone.
        weights: Name of the argument that takes the logarithms of the slots' sizes `[B * heads, 1, K]`, to be added
            to the scores of the keys; None where there is none.
        attention: Path in each block of the attention that adds them.
        per_token: Names of arguments with an entry for each token, which merged tokens cannot have; that of an entry in
            a dict is the dict's and its own, `kwargs.masks`.
        option: The option that merges around these blocks, for messages.
        grid_arguments: Further arguments of `grid`, such as the side of a patch.
        line: What makes the order of the tokens, of those inputs, the tokens and the sides of a cell, where they do not
            show the grid by their shapes (NOTE [Tokens on a line]); None where they do.
        frames: Whether tokens are those of a video, each frame of which is matched by itself: `grid` makes the number
            of frames, and the height and width of one.
        adapted: Arguments that are others where tokens are merged.
        skips: Whether a call may leave out some of the blocks.
        texts: For each block, the name of its argument with tokens of text `[B, T, C]` that it puts before those of the
            grid itself, as many in every block, so that it is handed a slot map of both; None where it does not. That
            of the tokens where these are text and grid already, `[B, T + N, C]`: such a block returns them alone.
    """

    blocks: tuple[str, ...]
    tokens: str
    arguments: tuple[tuple[tuple[str, Any], ...] | None, ...]
    grid_inputs: tuple[str, ...]
    grid: Callable[..., tuple[int, ...]]
    ratio: str
    result: int | None = None
    weights: str | None = None
    attention: str = ""
    per_token: tuple[str, ...] = ()
    option: str = ""
    grid_arguments: tuple[Any, ...] = ()
    line: Callable[..., Tensor] | None = None
    frames: bool = False
    adapted: tuple[Adapted, ...] = ()
    skips: bool = False
    texts: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Scope:
    """A module of a block that is to see merged tokens, by what its calls look like: what `insert_merge` needs.

    Args:
        module: Its name in the block.
        tokens: Name of its argument that holds the tokens `[B, N, C]`; by position it is the first.
        result: Place of the tokens in the tuple that it returns, or several; None where it returns them alone.
        keys: Name of the argument that takes tokens to attend to, where these are others than those that attend; None
            where there is none.
        weights: Name of the argument that takes the logarithms of the slots' sizes `[B * heads, 1, K]`, to be added
            to the scores of the keys; None where there is none.
        per_token: Names of arguments, given by keyword, with an entry for each token, which merged tokens cannot have.
        option: The option that merges around this module, for messages.
    """

    module: str
    tokens: str
    result: int | tuple[int, ...] | None = None
    keys: str | None = None
    weights: str | None = None
    per_token: tuple[str, ...] = ()
    option: str = ""
