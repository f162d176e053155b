"""What a pass is told of a model, as data: blocks that share a grid, and modules in them that see merged tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stack:
    """Blocks in a row that take and return the same tokens, and where their grid is known: what `insert_match` needs.

    Args:
        blocks: Their names in the module that calls them.
        tokens: Name of a block's argument that holds the tokens `[B, N, C]`; by position it is the first.
        defaults: For each block, the default values of its positional arguments, in order: where it is called through a
            function, its slot map must come after all of them. None for a block that takes any number.
        image: Name of the input of the calling module that shows the grid.
        grid: What makes height and width of that input.
        ratio: Path of the attribute of the calling module that holds the ratio, from `ops.as_read`.
    """

    blocks: tuple[str, ...]
    tokens: str
    defaults: tuple[tuple[Any, ...] | None, ...]
    image: str
    grid: Callable[[Any], tuple[int, int]]
    ratio: str


@dataclass(frozen=True)
class Scope:
    """A module of a block that is to see merged tokens, by what its calls look like: what `insert_merge` needs.

    Args:
        module: Its name in the block.
        tokens: Name of its argument that holds the tokens `[B, N, C]`; by position it is the first.
        result: Place of the tokens in the tuple that it returns; None where it returns them alone.
        weights: Name of the argument that takes the logarithms of the slots' sizes `[B, 1, K]`, to be added to the
            scores of the keys; None where there is none.
        per_token: Names of arguments, given by keyword, with an entry for each token, which merged tokens cannot have.
        option: The option that merges around this module, for messages.
    """

    module: str
    tokens: str
    result: int | None = None
    weights: str | None = None
    per_token: tuple[str, ...] = ()
    option: str = ""
