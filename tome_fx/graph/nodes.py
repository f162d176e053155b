"""Functions that rewritten graphs call beside those of `ops`, named so that printed graphs read."""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tome_fx import ops
from tome_fx.plan import OR_MERGE_NOTHING, TransformError


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is itself a value of the graph."""
    return function(*args, **kwargs)


def returning(count: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is known to return so many values; a node of rewritten graphs.

    Raises:
        TransformError: It returns another number of them, which the rest of the graph was not made for.
    """
    results = module(*args, **kwargs)
    if len(results) != count:
        processor = type(getattr(module, "processor", module))
        raise TransformError(
            f"{processor.__module__}.{processor.__qualname__} returned {len(results)} values where {count} were "
            "expected: merging in parts of a block cannot follow it. Leave it out, or merge whole blocks"
        )
    return results


def refused_if_merged(
    argument: Any, slots: ops.SlotMap | None, name: str, module: str, option: str, key: str = ""
) -> Any:
    """The argument itself; a node of rewritten graphs.

    Raises:
        TransformError: Tokens are merged, and the argument, or what it has under `key`, has an entry for each token of
            the grid.
    """
    value = argument.get(key) if key and argument is not None else argument
    if value is not None and slots is not None:
        raise TransformError(
            f"{name} was given to {module}, whose tokens are merged ({option}=True): it has an entry for every image "
            f"token, and merged tokens are fewer. Leave {name} out, transform with {option}=False where the model "
            f"takes that, {OR_MERGE_NOTHING}"
        )
    return argument


def attend(attention: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call attention whose mask weighs merged tokens; a node of rewritten graphs.

    Raises:
        TransformError: It attends to other keys than the tokens it is given, and the mask does not fit them.
    """
    try:
        return attention(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error, TransformError) or not re.search("must match|broadcast|expanded size", str(error)):
            raise
        processor = type(getattr(attention, "processor", attention))
        raise TransformError(
            f"{processor.__module__}.{processor.__qualname__} failed on a mask, which is how merged tokens are weighed "
            f"(prop_attn), one number for each that it was handed: {error}. If it attends to other keys as well, such "
            "as those of another image, or takes no mask of [B * heads, 1, K], leave it out, or transform with "
            "prop_attn=False"
        ) from error


def merged_keys(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """What to attend to where keys and values alone are merged, None where nothing is; a node of rewritten graphs."""
    return None if slots is None else ops.merge(tokens, slots)


def of_grid(tokens: Tensor, *sides: int) -> Tensor:
    """The tokens of a grid with these sides, of a sequence `[B, T + N, C]` of text and grid; a node."""
    return tokens[:, tokens.shape[1] - math.prod(sides) :]


def of_text(tokens: Tensor, slots: ops.SlotMap | None) -> Tensor:
    """The tokens before those that a slot map is of, all of them where nothing is merged; a node."""
    return tokens if slots is None else tokens[:, : tokens.shape[1] - slots.slot.shape[1]]


def either(weights: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The weights of merged tokens, or the mask where nothing is merged; a node of rewritten graphs."""
    return mask if weights is None else weights
