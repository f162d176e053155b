"""From tokens and a slot map to merged tokens and back.

NOTE [Determinism]
No float is ever added atomically. `merge` sums the tokens of a slot in their order on the grid, by a bag sum
whose every output is owned by one thread. The one scatter of a match writes each index once. Two runs agree bit for
bit. The price is that Inductor leaves the sorts, the search and the bag sum to ATen: a scatter_add would be one kernel,
but its atomics add in any order on a GPU, and on a CPU it is no faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_fx.ops.matching import SlotMap

ALIGNED = 8  # numbers that rows of a mask begin at a multiple of, for kernels of attention on a GPU


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
    return tokens.gather(1, slots.slot.long()[..., None].expand(-1, -1, tokens.shape[-1]))


def changed(tokens: Tensor, merged: Tensor, result: Tensor, slots: SlotMap | None) -> Tensor:
    """The tokens, each with what its slot was changed by: merged tokens may be given to what adds to them.

    Args:
        tokens: `[B, N, C]`.
        merged: What `merge` makes of them, `[B, K, C]`.
        result: What was made of these, `[B, K, C]`.
        slots: From `match`.

    Returns:
        `[B, N, C]`, or `result` itself where `slots` is None.
    """
    if slots is None:
        return result
    return tokens + unmerge(result - merged, slots)


def log_sizes(tokens: Tensor, slots: SlotMap | None, heads: int = 1) -> Tensor | None:
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
    start = slots.start.flatten()
    sizes = F.pad(start[1:], (0, 1), value=batch * count) - start
    weights = sizes.to(torch.promote_types(tokens.dtype, torch.float32)).log().to(tokens.dtype)
    kept = slots.start.shape[1]
    # Rows are padded also where they are aligned, for whether they are would be another graph where K is symbolic.
    more = ALIGNED - kept % ALIGNED
    weights = F.pad(weights.view(batch, 1, 1, kept).expand(-1, heads, -1, -1).reshape(-1, 1, kept), (0, more))
    return weights.as_strided((batch * heads, 1, kept), weights.stride())
