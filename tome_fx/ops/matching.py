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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree

from tome_fx import plan
from tome_fx.ops.tiling import Tiles

SCORES = 2**26  # bytes of float32 similarities that an image may have at a time
COUNTED = 36**2  # tokens of a tile that are put in order by counting, at most: of 32 x 32 and beyond the last cell
SORTED = 512  # tokens of a tile that Inductor sorts in a kernel of its own, at most
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

    grid = Tiles.of(height, width, sx, sy, tile, seed, tokens.device)
    # See NOTE [How many merge in each tile] in tiling.py.
    first, following = (c - c * (count - kept) // count for c in (grid.before, grid.before + grid.tokens))
    best, nearest = _search(tokens.detach(), grid)
    slot = first + _joined(best, nearest, grid, grid.tokens - (following - first))
    fits = statically_known_true(kept < 2**15)  # a sort takes a pass for every few bits
    slot = grid.filled(slot.to(torch.int16 if fits else torch.int32), grid.place_of_position, kept)

    image = torch.arange(batch, dtype=torch.int32, device=tokens.device)[:, None]

    def told(slot: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The slot itself and the token at a position of each tile, numbered through the batch."""
        return slot, (grid.token_of_position(position) + image[..., None] * count).int()

    # On a GPU, Inductor of torch 2.11 cannot search a view of what it has not written yet, such as a sum: the slots are
    # searched as a sort or a gather has written them, in a dimension of images.
    in_order, order = map(grid.by_tiles, _in_order(slot, told))
    slots = torch.arange(kept, dtype=slot.dtype, device=tokens.device).repeat(batch, 1)
    start = torch.searchsorted(in_order, slots, out_int32=True) + image * count
    return SlotMap(grid.by_rows(slot).int(), order, start)


def _search(tokens: Tensor, grid: Tiles) -> tuple[Tensor, Tensor]:
    """How similar each source is to the destination most similar to it, -inf at a gap, and the place of that one.

    Both are `[B, T, S]`, at the places after those for destinations.
    """
    token, number = grid.token_of_place, grid.destinations
    # Inductor cannot tell that an index is in bounds without a clamp, and would check it on the device.
    unit = _unit(tokens.index_select(1, token.clamp(0, tokens.shape[1] - 1).flatten()))
    unit = unit.view(tokens.shape[0], *token.shape, -1)
    sources, destinations = unit[:, :, number:], unit[:, :, :number].mT
    parts, scores = 1, 4 * grid.down.tiles * grid.right.tiles * number  # bytes for one source of each tile
    # Symbolic sizes are searched at once: the number of parts is one of operations, and of another graph for each.
    while statically_known_true(-(-(grid.places - number) // parts) * scores > SCORES):
        parts += 1
    found = [
        grid.filled(part @ destinations, token[:, None, :number], -torch.inf).max(dim=-1)
        for part in sources.chunk(parts, dim=2)
    ]
    best, nearest = (torch.cat(of_parts, dim=2) for of_parts in zip(*found, strict=True))
    return grid.filled(best, token[:, number:], -torch.inf), nearest


def _joined(best: Tensor, nearest: Tensor, grid: Tiles, merged: Tensor) -> Tensor:
    """The slot of each token among those of its tile, `[B, T, P]` by position; any at a gap.

    Ranking rather than comparing with a threshold merges exactly the asked number, whatever ties or NaNs there are.
    """
    place, number = grid.place_of_position, grid.destinations
    source = (place - number).clamp(min=0).expand(*best.shape[:2], -1)
    rank = _rank(best, source)
    joined = torch.where(rank < merged, grid.cell_of_place(nearest.gather(2, source)), grid.cells + rank - merged)
    return torch.where(place < number, grid.cell_of_place(place), joined)


def _rank(similar: Tensor, source: Tensor) -> Tensor:
    """How many of S sources come before these when the most similar come first: of `[B, T, S]` at `[B, T, P]`.

    Of equals the first comes first, and NaN before all. Where few are counted, Inductor makes one kernel of that and of
    all that is done with the rank. A CPU sorts them faster.
    """
    return _counted(similar, source) if _is_counted(similar) else _sorted(similar, source)


def _counted(similar: Tensor, source: Tensor) -> Tensor:
    similar = torch.where(similar.isnan(), torch.inf, similar)
    own, others = similar.gather(2, source)[..., None], similar[:, :, None]
    place = torch.arange(similar.shape[2], dtype=torch.int32, device=similar.device)
    before: Tensor = (others > own) | ((others == own) & (place < source[..., None]))
    return before.sum(dim=3, dtype=torch.int32)


def _sorted(similar: Tensor, source: Tensor) -> Tensor:
    ranked = similar.argsort(dim=2, descending=True, stable=True)
    place = torch.arange(similar.shape[2], dtype=torch.int32, device=similar.device)
    # Inductor writes a scatter of int32 itself, and leaves one of int64 to ATen.
    rank = torch.empty_like(ranked, dtype=torch.int32).scatter_(2, ranked, place.expand_as(ranked))
    return rank.gather(2, source)


def _in_order(slot: Tensor, told: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What is told of each slot `[B, T, P]` and of its position, in the order of the slots; of equals the first first.

    A CPU sorts faster than it counts. So does a GPU where Inductor sorts in one kernel; else ATen would, in many.
    """
    if not _is_counted(slot, above=SORTED):
        return told(*slot.sort(dim=2, stable=True))
    image, tile, position = (torch.arange(size, dtype=torch.int32, device=slot.device) for size in slot.shape)
    key = slot.int() * slot.shape[2] + position
    place = (key[:, :, None] < key[..., None]).sum(dim=3)
    # Inductor makes one kernel of the counting and of all that is put, and would fill what is scattered to in another.
    index = (image[:, None, None], tile[:, None], place)
    return tuple(
        torch.empty_like(key, dtype=values.dtype).index_put_(index, values.expand_as(key))
        for values in told(slot, position)
    )


def _is_counted(values: Tensor, above: int = 0) -> bool:
    """Whether the values `[B, T, P]` of each tile, more than `above`, are put in order by counting."""
    count = _as_number(values.shape[2])
    enough, few = statically_known_true(count > above), statically_known_true(count <= COUNTED)
    return values.device.type != "cpu" and enough and few


def _as_number(size: int | Tensor) -> int:
    """The size itself, or its value under `torch.jit.trace`, which makes tensors of sizes and traces one of them."""
    return int(size) if isinstance(size, Tensor) else size


def _unit(tokens: Tensor) -> Tensor:
    """Tokens of length 1, or 0 where a token is zero. In float32, where a sum of squares of fp16 fits."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)
    return (tokens * length.clamp_min(1e-15).reciprocal()).to(tokens.dtype)
