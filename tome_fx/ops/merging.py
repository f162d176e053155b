"""From tokens and a slot map to merged tokens and back.

NOTE [Determinism]
No float is ever added atomically. `merge` sums the tokens of a slot in their order on the grid, by a bag sum
whose every output is owned by one thread. The one scatter of a match writes each index once. Two runs agree bit for
bit. The price is that Inductor leaves the bag sum to ATen, as it does a sort of more than 512: a scatter_add would be
one kernel, but its atomics add in any order on a GPU, and on a CPU it is no faster.

NOTE [A mask in memory]
diffusers repeats a mask `[B, 1, K]` for every head, and its attention expands it to `[B, heads, K, K]`. That costs
nothing where the mask is a view of memory, each row of which begins at a multiple of 8 numbers, as the kernels of a GPU
ask. Else Inductor writes out what was expanded, 134 MB at 64 x 64 tokens and 8 heads in fp16. So the weights are
repeated here, to `[B * heads, 1, K]`, which diffusers takes as it is, and their rows are padded and written down: see
NOTE [Written down once] in tiling.py. They are padded also where they are aligned, for whether they are would be
another graph where K is symbolic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_fx.ops.matching import SlotMap
from tome_fx.ops.tiling import once

ALIGNED = 8  # rows of a mask begin at a multiple of so many numbers: see NOTE [A mask in memory]


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
    # A view is compiled for as one: blocks compiled by themselves would be compiled again for the first of a stack.
    merged: Tensor = torch.ops.aten._unsafe_view(bags.to(tokens.dtype), (*slots.start.shape, tokens.shape[2]))
    return merged


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
    # Rows would be copied faster on a CPU, but written down: Inductor keeps a gather within the kernel that reads it.
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


def log_sizes(tokens: Tensor, slots: SlotMap | None, heads: int = 1, *, before: int = 0) -> Tensor | None:
    """The logarithm of how many tokens each slot stands for: proportional attention adds it to the scores of its keys.

    A key with the logarithm of a count added to its scores is attended to as that many copies of it would be. So
    attention over merged tokens is attention over all tokens, each in the place of its slot's mean.

    Args:
        tokens: `[B, N, C]`, for their dtype.
        slots: From `match`.
        heads: Heads of the attention that takes them as a mask: see NOTE [A mask in memory].
        before: How many keys stand before those of the slots, such as those of text. Each of them is one token.

    Returns:
        `[B * heads, 1, before + K]`, the same for every query and head, or None where `slots` is None.

    Source: Bolya et al., "Token Merging: Your ViT But Faster" (2023), equation 1.
    """
    if slots is None:
        return None
    batch, kept = slots.start.shape
    start = slots.start.flatten()
    # The last slot ends where the first begins, past the end. A pad with that number would be a graph for it alone.
    sizes = (start.roll(-1) - start - 1) % slots.slot.numel() + 1
    weights = sizes.to(torch.promote_types(tokens.dtype, torch.float32)).log().to(tokens.dtype)
    weights = weights.view(batch, 1, 1, kept).expand(-1, heads, -1, -1).flatten(0, 1)
    keys = before + kept
    return once(F.pad(weights, (before, ALIGNED - keys % ALIGNED)))[..., :keys]
