"""The operations of token merging: `match` finds a slot map, `merge` and `unmerge` apply it, `log_sizes` weighs it.

A slot map gives every token its place in the merged sequence of K tokens. It is None on a grid without a whole cell;
`merge` and `unmerge` are then the identity.

All shapes follow from the arguments' shapes and from Python numbers, never from data, so that one graph serves
every input. Nothing draws random numbers.

NOTE [Determinism]
No float is ever added atomically. `merge` sums the tokens of a slot in their order on the grid, by a bag sum
whose every output is owned by one thread. The one scatter writes each index once. Two runs agree bit for bit.
The price is that Inductor leaves the sorts, the search and the bag sum to ATen: a scatter_add would be one kernel, but
its atomics add in any order on a GPU, and on a CPU it is no faster.

NOTE [K is a shape]
K is known where the match is made and travels as the length of `SlotMap.start`. Whoever merges reads it there, so that
a merge is the same code at every ratio, and only the graphs that hold a match know one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_fx import plan


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


def match(tokens: Tensor, height: int, width: int, *, kept: int, sx: int, sy: int, seed: int | None) -> SlotMap | None:
    """Plan a merge: which tokens join which destination, by cosine similarity.

    Every whole `sy x sx` cell of the grid gives one destination, all other tokens are sources. The `N - kept` sources
    most similar to any destination join that destination.

    Args:
        tokens: Image tokens, `[B, N, C]` with `N = height * width`, in row-major order. Not differentiated.
        height: Rows of the token grid.
        width: Columns of the token grid.
        kept: K, the tokens to keep, from the number of whole cells to N.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Chooses the destination in each cell, pseudo-randomly; None takes the top left of every cell.

    Returns:
        The slot map, or None on a grid smaller than a cell.

    Raises:
        ValueError: The batch is empty.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), section 4.
    """
    batch, count, _ = tokens.shape
    if batch == 0:
        raise ValueError("the batch must hold at least 1 image, got 0: there are no tokens to match")
    cells = (height // sy) * (width // sx)
    if cells == 0:
        return None

    # Inductor must know that a symbolic K is not 0, to sort the strides of what a backward pass needs. max(1, K) is no
    # form that it can tell that of.
    kept = 1 + torch.sym_max(0, kept - 1)

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


def merge(tokens: Tensor, slots: SlotMap | None) -> Tensor:
    """The mean of each slot's tokens.

    Args:
        tokens: `[B, N, C]`.
        slots: From `match`.

    Returns:
        `[B, K, C]`, or `tokens` itself where `slots` is None.
    """
    if slots is None:
        return tokens
    flat = tokens.flatten(0, 1)
    if flat.dtype == torch.float16 and flat.device.type == "cpu":
        flat = flat.float()  # a GPU sums in float32 by itself, a CPU in float16, where a sum may not fit
    # A bag sum reads each token once and needs no copy in slot order; see NOTE [Determinism].
    bags = F.embedding_bag(slots.order.flatten(), flat, slots.start.flatten(), mode="mean")
    return bags.to(tokens.dtype).view(*slots.start.shape, -1)


def unmerge(tokens: Tensor, slots: SlotMap | None) -> Tensor:
    """Give every token of the grid a copy of its slot: one gather.

    Args:
        tokens: Merged tokens, `[B, K, C]`.
        slots: From `match`.

    Returns:
        `[B, N, C]`, or `tokens` itself where `slots` is None.
    """
    if slots is None:
        return tokens
    return tokens.gather(1, slots.slot[..., None].expand(-1, -1, tokens.shape[-1]))


def log_sizes(tokens: Tensor, slots: SlotMap | None) -> Tensor | None:
    """The logarithm of how many tokens each slot stands for: proportional attention adds it to the scores of its keys.

    A key with the logarithm of a count added to its scores is attended to as that many copies of it would be. So
    attention over merged tokens is attention over all tokens, each in the place of its slot's mean.

    Args:
        tokens: `[B, N, C]`, for their dtype.
        slots: From `match`.

    Returns:
        `[B, 1, K]`, the same for every query, or None where `slots` is None.

    Source: Bolya et al., "Token Merging: Your ViT But Faster" (2023), equation 1.
    """
    if slots is None:
        return None
    batch, count = slots.slot.shape
    end = count * torch.arange(1, batch + 1, device=slots.start.device)[:, None]
    sizes = slots.start.diff(append=end).to(torch.promote_types(tokens.dtype, torch.float32))
    return sizes.log().to(tokens.dtype)[:, None]


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
    turn = (y % sy * sx + x % sx - first) % (sx * sy)  # 0 at the destination
    place = turn * (rows * columns) + cell
    beside = rows * sy * columns * sx + y * (width - columns * sx) + x - columns * sx
    place = torch.where(x < columns * sx, place, beside)
    place = torch.where(y < rows * sy, place, token)
    # Inverting a permutation by a scatter also keeps Inductor from computing all of this anew for each channel.
    return torch.empty_like(place).scatter_(0, place, token)


def _unit(tokens: Tensor) -> Tensor:
    """Tokens of length 1, or 0 where a token is zero. In float32, where a sum of squares of fp16 fits."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (wide * wide.square().sum(-1, keepdim=True).clamp_min(1e-30).rsqrt()).to(tokens.dtype)
