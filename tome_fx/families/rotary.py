"""What the blocks of transformers are given for each token: places to turn queries and keys by, and weights.

NOTE [Places of merged tokens]
Queries and keys are turned by a table with a row for each token. Merged tokens have the row of their destination, which
is another token in each image, and diffusers' functions want one table `[S, D]` for all images. They do no more with it
than put in dimensions of 1. So they are given an object that does that to `[B, S, D]`; there is no arithmetic in it.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from tome_fx import ops
from tome_fx.families.weights import why_unweighed_by_default


class Rows:
    """A table of its own for each image that passes for one table: see NOTE [Places of merged tokens].

    Args:
        rows: `[B, S, D]`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: tuple[Any, ...]) -> Tensor:
        """`table[None, :, None, :]`, whose first dimension, of all images, is that of the images here."""
        own = slice(None), *index[1:]
        return self.rows[own]

    def unsqueeze(self, dim: int) -> Tensor:
        """`table.unsqueeze(dim)`, with the images before its dimensions."""
        return self.rows.unsqueeze(dim + 1)

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse in words what else a processor of the user's asks a table for.

        Raises:
            AttributeError: Always: it is called for what is not there.
        """
        raise AttributeError(
            f"the table of places has no {name} where tokens are merged, for it is another one in each image: an "
            "attention processor may put in dimensions of 1 as diffusers' own do, by table[None, :, None, :] or "
            "unsqueeze, and no more. Leave the processor out, or the merging"
        )


def after_text(table: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """The cosines and sines of a sequence of text and image; a node of rewritten graphs.

    Args:
        table: Two tensors `[T + N, D]`, or None.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    if places is None or slots is None or table is None:
        return table
    rows = _after_text(places, table[0].shape[0] - slots.slot.shape[1])
    return tuple([Rows(part[rows]) for part in table])


def mask_after_text(mask: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """A mask of a sequence of text and image; a node of rewritten graphs.

    Args:
        mask: `[B, T + N]`, or None.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    if places is None or slots is None or mask is None:
        return mask
    return _rows(mask, _after_text(places, mask.shape[1] - slots.slot.shape[1]))


def beside_text(tables: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """The tables of image and text where each has its own; a node of rewritten graphs.

    Args:
        tables: Of the image, `[N, D]`, and of the text; or None.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    if places is None or tables is None:
        return tables
    image, text = tables
    return Rows(image[places]), text


def of_image(tables: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """The cosines and sines of the image alone; a node of rewritten graphs.

    Args:
        tables: Two tensors `[N, D]`, or None.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    if places is None or tables is None:
        return tables
    return tuple([Rows(part.to(places.device)[places]) for part in tables])  # CogView 4 makes its own on the CPU


def of_each(tables: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """Tables that have a dimension of images before that of their tokens; a node of rewritten graphs.

    Args:
        tables: Tensors `[B, N, ...]`, or `[1, N, ...]` for all images.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    return tables if places is None else tuple([_rows(part, places) for part in tables])


def of_each_where_many(given: Tensor, slots: ops.SlotMap | None, places: Tensor | None) -> Tensor:
    """What blocks are shifted and scaled by, where each token has its own; a node of rewritten graphs.

    Args:
        given: `[B, N, parts, C]`, or `[B, parts, C]` for all tokens.
        slots: The slot map.
        places: From `ops.places`, `[B, K]`.
    """
    return given if places is None or given.ndim == 3 else _rows(given, places)


def of_each_unless_one(given: Tensor, slots: ops.SlotMap | None, places: Tensor | None) -> Tensor:
    """The same where what is for all tokens is `[B, 1, C]`; a node of rewritten graphs."""
    return given if places is None or given.shape[1] == 1 else _rows(given, places)


def merged(tokens: Any, slots: ops.SlotMap | None, places: Tensor | None) -> Any:
    """Tokens that a block takes besides those it changes, `[B, N, C]`, or None; a node of rewritten graphs."""
    return None if tokens is None else ops.merge(tokens, slots)


def _after_text(places: Tensor, text: int) -> Tensor:
    """The rows `[B, T + K]` of text, all of them, and of these places in an image after it."""
    alone = torch.arange(text, device=places.device).expand(places.shape[0], -1)
    return torch.cat([alone, places + text], dim=1)


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """The rows of a table `[B or 1, N, ...]` at these places of each image."""
    image = torch.arange(places.shape[0], device=places.device)[:, None]
    return table.expand(places.shape[0], *table.shape[1:])[image, places]


def weights_after_text(
    options: dict[str, Any] | None,
    slots: ops.SlotMap | None,
    places: Tensor | None,
    table: tuple[Tensor, Tensor],
    *like: Tensor | None,
) -> dict[str, Any] | None:
    """Options of attention with a mask that weighs merged tokens and leaves text as it is; a node of rewritten graphs.

    Args:
        options: What attention is given by name, or None.
        slots: The slot map.
        places: From `ops.places`.
        table: Two tensors `[T + N, D]`, of the text, which comes first, and the image.
        like: Tensors of the tokens' dtype, or None: kinds of blocks have them by different names.
    """
    if slots is None:
        return options
    some = next(tensor for tensor in like if tensor is not None)
    mask = ops.log_sizes(some, slots, before=table[0].shape[0] - slots.slot.shape[1])
    return options if mask is None else {**(options or {}), "attention_mask": mask[:, None]}


def weights_beside_text(
    options: dict[str, Any] | None, slots: ops.SlotMap | None, places: Tensor | None, text: Tensor
) -> dict[str, Any] | None:
    """The same of attention that repeats a mask `[B, 1, T + K]` for its heads itself; a node of rewritten graphs.

    Args:
        options: What attention is given by name, or None.
        slots: The slot map.
        places: From `ops.places`.
        text: `[B, T, C]`, the tokens of text, which come before the image's.
    """
    mask = ops.log_sizes(text, slots, before=text.shape[1])
    return options if mask is None else {**(options or {}), "attention_mask": mask}


def where_taken(block: Any, options: dict[str, Any] | None, weighed: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options of a block's attention with weights, or without where it cannot take them; a node."""
    attention = getattr(block, "attn", None) or block.attn1
    return options if why_unweighed_by_default(attention) else weighed
