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

LENGTH_AT_ZERO = 2  # of a dynamic ratio: see NOTE [A ratio as graphs read it]


class SlotMap(NamedTuple):
    """The whole plan of a merge of N tokens to K. All tensors are int64.

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
    tokens: Tensor, height: int, width: int, *, kept: int | None, sx: int, sy: int, seed: int | None
) -> SlotMap | None:
    """Plan a merge: which tokens join which destination, by cosine similarity.

    Every whole `sy x sx` cell of the grid gives one destination, all other tokens are sources. The `N - kept` sources
    most similar to any destination join that destination.

    Args:
        tokens: Image tokens, `[B, N, C]` with `N = height * width`, in row-major order. Not differentiated.
        height: Rows of the token grid.
        width: Columns of the token grid.
        kept: K, the tokens to keep, from the number of whole cells to N; None merges nothing.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Chooses the destination in each cell, pseudo-randomly; None takes the top left of every cell.

    Returns:
        The slot map, or None where `kept` is and on a grid smaller than a cell.

    Raises:
        ValueError: The batch is empty.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), section 4.
    """
    batch = tokens.shape[0]
    if kept is None:
        return None
    if batch == 0:
        raise ValueError("the batch must hold at least 1 image, got 0: there are no tokens to match")
    count = height * width
    cells = (height // sy) * (width // sx)
    if cells == 0:
        return None

    # Inductor must know that a symbolic K is not 0, to sort the strides of what a backward pass needs. max(1, K) is no
    # form that it can tell that of. Before torch 2.12 dynamo does not fold a sym_max of plain numbers: max
    # can go when the floor is there.
    kept = 1 + (max(0, kept - 1) if isinstance(kept, int) else torch.sym_max(0, kept - 1))

    order = destinations_first(height, width, sx, sy, seed, tokens.device)
    unit = _unit(tokens.detach())
    similarity = unit[:, order[cells:]] @ unit[:, order[:cells]].mT  # [B, sources, cells]
    best, nearest = similarity.max(dim=-1)

    # Ranking rather than comparing with a threshold merges exactly `removed` tokens, whatever ties or NaNs there are.
    removed = count - kept
    ranked = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(count - cells, device=tokens.device)
    source_slot = torch.where(rank < removed, nearest.gather(1, ranked), cells + rank - removed)

    cell = torch.arange(cells, device=tokens.device).expand(batch, cells)
    token = torch.cat([order[:cells].expand(batch, cells), order[cells:][ranked]], dim=1)
    slot = torch.empty_like(token).scatter_(1, token, torch.cat([cell, source_slot], dim=1))

    in_order, token = slot.sort(dim=1, stable=True)
    start = torch.searchsorted(in_order, torch.arange(kept, device=slot.device).repeat(batch, 1))
    row = count * torch.arange(batch, device=slot.device)[:, None]
    return SlotMap(slot, token + row, start + row)


def destinations_first(height: int, width: int, sx: int, sy: int, seed: int | None, device: torch.device) -> Tensor:
    """All tokens of the grid, destinations before sources: a pure function of the grid and the seed.

    Returns:
        order: int64 `[N]`. First one token of each whole cell, then the cells' other tokens, then the tokens right
        of the last whole cell, then those below it.
    """
    rows, columns = height // sy, width // sx
    token = torch.arange(height * width, device=device)
    y, x = token // width, token % width
    cell = y // sy * columns + x // sx
    first = 0 if seed is None else plan.scramble(cell + seed) % (sx * sy)
    offset = (y % sy * sx + x % sx - first) % (sx * sy)  # in the cell, from its destination on
    index = offset * (rows * columns) + cell
    right_of_cells = rows * sy * columns * sx + y * (width - columns * sx) + x - columns * sx
    index = torch.where(x < columns * sx, index, right_of_cells)
    index = torch.where(y < rows * sy, index, token)
    # Inverting a permutation by a scatter also keeps Inductor from computing all of this anew for each channel.
    return torch.empty_like(index).scatter_(0, index, token)


def _as_number(size: int | Tensor) -> int:
    """The size itself, or its value under `torch.jit.trace`, which makes tensors of sizes and traces one of them."""
    return int(size) if isinstance(size, Tensor) else size


def _unit(tokens: Tensor) -> Tensor:
    """Tokens of length 1, or 0 where a token is zero. In float32, where a sum of squares of fp16 fits."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (wide * wide.square().sum(-1, keepdim=True).clamp_min(1e-30).rsqrt()).to(tokens.dtype)
