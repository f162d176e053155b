"""From tokens to a slot map: which tokens join which destination.

A slot map gives every token its place in the merged sequence of K tokens. It is None where nothing is merged: at a
ratio of 0, and on a grid without a whole cell.

NOTE [K is a shape]
K is known where the match is made and travels as the length of `SlotMap.start`. Whoever merges reads it there, so that
a merge is the same code at every ratio, and only the graphs that hold a match know one.

NOTE [A ratio as graphs read it]
A static ratio is text: to dynamo that is a constant under all settings, one compile for each, where a float may become
symbolic. A size of a tensor may be dynamic. So a dynamic ratio is an empty tensor whose length says the ratio in
thousandths, and one graph serves every ratio. The length is 2 at a ratio of 0, for dynamo takes the sizes 0 and 1 as
constants too. Thousandths keep every product below 2**31, which index arithmetic on a GPU needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from tome_fx import plan
from tome_fx.ops.tiling import Tiles, tiles

SCORES = 2**26  # bytes of float32 similarities that an image may have at a time where all are compared with all
LENGTH_AT_ZERO = 2  # of a dynamic ratio: see NOTE [A ratio as graphs read it]


class SlotMap(NamedTuple):
    """The whole plan of a merge of N tokens to K. All tensors are int32.

    Args:
        slot: `[B, N]`, each token's place in the merged sequence, in `[0, K)`. Destinations come first, in the order
            of their cells, then the sources that stay alone.
        order: `[B, N]`, all tokens sorted by their slot, as rows of the batch's `[B * N, C]`.
        start: `[B, K]`, where the tokens of each slot begin among the `B * N` of `order`.
    """

    slot: Tensor
    order: Tensor
    start: Tensor


# A block that is exported by itself has a slot map among its inputs: its program is saved with the name of the type and
# loaded with an example of one.
_pytree._register_namedtuple(SlotMap, serialized_type_name="tome_fx.ops.SlotMap")
torch.serialization.add_safe_globals([SlotMap])


def grid_of(image: Tensor) -> tuple[int, int]:
    """Height and width of an image `[B, C, H, W]`, the grid that its tokens lie on."""
    height, width = image.shape[-2:]
    return _as_number(height), _as_number(width)


def kept(height: int, width: int, ratio: str | Tensor) -> int | None:
    """K, the tokens that a merge leaves of `height x width`, or None where nothing is to be merged.

    Args:
        height: Rows of the token grid.
        width: Columns of the token grid.
        ratio: From `as_read`.
    """
    if isinstance(ratio, Tensor):
        return plan.kept_by_thousandths(height, width, _as_number(ratio.shape[0]) - LENGTH_AT_ZERO)
    share = float(ratio)
    return plan.kept(height, width, share) if share else None


def as_read(ratio: float, *, dynamic: bool) -> str | Tensor:
    """A ratio for graphs to read: see NOTE [A ratio as graphs read it]."""
    if not dynamic:
        return repr(float(ratio))
    with torch.inference_mode(False):  # an inference tensor fails the guard of a graph compiled outside of it
        size = torch.empty(LENGTH_AT_ZERO + round(ratio * plan.THOUSAND), 0, dtype=torch.float32, device="cpu")
    torch._dynamo.mark_dynamic(size, 0)
    return size


def ratio_of(ratio: str | Tensor) -> float:
    """What `as_read` was given."""
    return (ratio.shape[0] - LENGTH_AT_ZERO) / plan.THOUSAND if isinstance(ratio, Tensor) else float(ratio)


def match(
    tokens: Tensor,
    height: int,
    width: int,
    *,
    kept: int | None,
    sx: int,
    sy: int,
    seed: int | None,
    tile: int | None = None,
) -> SlotMap | None:
    """Plan a merge: which tokens join which destination, by cosine similarity.

    Every whole `sy x sx` cell of the grid gives one destination, all other tokens are sources. The `N - kept` sources
    most similar to any destination join that destination. With tiles, each tile merges its share of them within itself:
    see NOTE [Tiles] in tiling.py.

    Args:
        tokens: Image tokens, `[B, N, C]` with `N = height * width`, in row-major order. Not differentiated.
        height: Rows of the token grid.
        width: Columns of the token grid.
        kept: K, the tokens to keep, from the number of whole cells to N; None merges nothing.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Chooses the destination in each cell, pseudo-randomly; None takes the top left of every cell.
        tile: Side of the tiles, in tokens, at least `sx` and `sy`; None searches and ranks over the whole grid.

    Returns:
        The slot map, or None where `kept` is and on a grid smaller than a cell.

    Raises:
        ValueError: The batch is empty.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), section 4.
    """
    batch, count = tokens.shape[0], height * width
    if kept is None:
        return None
    if batch == 0:
        raise ValueError("the batch must hold at least 1 image, got 0: there are no tokens to match")
    if (height // sy) * (width // sx) == 0:
        return None

    # Inductor must know that a symbolic K is not 0, to sort the strides of what a backward pass needs. max(1, K) is no
    # form that it can tell that of. Before torch 2.12 dynamo does not fold a sym_max of plain numbers: max
    # can go when the floor is there.
    kept = 1 + (max(0, kept - 1) if isinstance(kept, int) else torch.sym_max(0, kept - 1))

    grid = tiles(height, width, sx, sy, tile, seed, tokens.device)
    best, nearest = _search(tokens.detach(), grid, in_parts=tile is None)

    # Ranking rather than comparing with a threshold merges exactly N - K tokens, whatever ties or NaNs there are.
    first, following = (c - c * (count - kept) // count for c in (grid.before, grid.before + grid.tokens))
    merged = grid.tokens - (following - first)  # of each tile; see NOTE [How many merge in each tile]
    place = torch.arange(nearest.shape[2], device=tokens.device)
    is_source = place < grid.tokens - grid.cells
    ranked = best.where(is_source, -torch.inf).argsort(dim=2, descending=True, stable=True)
    nearest = (nearest * (nearest < grid.cells)).gather(2, ranked)
    joined = torch.where(place < merged, nearest, grid.cells + place - merged) * is_source

    # Of every tile the destinations, then the sources by rank: token, and slot in the tile.
    cell = torch.arange(grid.destination.shape[1], device=tokens.device)
    is_cell = cell < grid.cells
    token = torch.cat([grid.destination.expand(batch, -1, -1), grid.source.expand_as(ranked).gather(2, ranked)], dim=2)
    slot = torch.cat([(cell * is_cell).expand(batch, -1, -1), joined], dim=2)
    slots = _written(slot + first, token, count)

    # And by slot; places without a token come last.
    place = torch.arange(slot.shape[2], device=tokens.device)
    in_order, by_slot = torch.where(torch.cat([is_cell, is_source], dim=1), slot, place.shape[0]).sort(
        dim=2, stable=True
    )
    row = count * torch.arange(batch, device=tokens.device)[:, None, None]
    is_token = place < grid.tokens
    order = _written(token.gather(2, by_slot) + row, grid.before + place * is_token, count)
    begins = is_token & (in_order != in_order.roll(1, dims=2))
    start = _written(grid.before + place * begins + row, first + in_order * begins, kept)
    return SlotMap(slots, order, start)


def _search(tokens: Tensor, grid: Tiles, *, in_parts: bool) -> tuple[Tensor, Tensor]:
    """How similar each source is to the destination most similar to it, and the place of that one: both `[B, T, S]`."""
    batch, (number, places) = tokens.shape[0], grid.source.shape
    unit = _unit(tokens[:, torch.cat([grid.destination, grid.source], dim=1).flatten()])
    unit = unit.view(batch, number, -1, unit.shape[-1])
    sources, destinations = unit[:, :, -places:], unit[:, :, :-places].mT
    parts = 1
    if in_parts:
        parts += number * places * destinations.shape[-1] * 4 // SCORES
    found = [(part @ destinations).max(dim=-1) for part in sources.chunk(parts, dim=2)]
    best, nearest = zip(*found, strict=True)
    return torch.cat(best, dim=2), torch.cat(nearest, dim=2)


def _written(values: Tensor, places: Tensor, size: int) -> Tensor:
    """int32 `[B, size]` with the values `[B, T, P]` at these places; those for one place are equal.

    Inductor writes a scatter of int32 itself, and leaves one of int64 to ATen.
    """
    result = torch.empty(values.shape[0], size, dtype=torch.int32, device=values.device)
    return result.scatter_(1, places.expand_as(values).flatten(1), values.flatten(1).int())


def _as_number(size: int | Tensor) -> int:
    """The size itself, or its value under `torch.jit.trace`, which makes tensors of sizes and traces one of them."""
    return int(size) if isinstance(size, Tensor) else size


def _unit(tokens: Tensor) -> Tensor:
    """Tokens of length 1, or 0 where a token is zero. In float32, where a sum of squares of fp16 fits."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (wide * wide.square().sum(-1, keepdim=True).clamp_min(1e-30).rsqrt()).to(tokens.dtype)
