"""Tables as the pages show them."""

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

from tabulate import tabulate


def table(lines: Iterable[Sequence[Any]], heads: Sequence[str]) -> str:
    """The lines below the heads, cells as they are."""
    return tabulate(list(lines), heads, tablefmt="github", disable_numparse=True)


def without_empty(lines: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    """The same, without the columns that nothing stands in."""
    filled = [any(line[i] != "" for line in lines if i < len(line)) for i in range(len(heads))]
    return table([list(compress(line, filled)) for line in lines], list(compress(heads, filled)))
