"""Which levels of a model are merged at where nobody has said: those where merging pays.

NOTE [Where merging pays]
What merging saves are FLOPs, and what it costs are launches: on a GPU its operations are so small that it is launching
them, and reading and writing tokens between them, that takes time. So a launch is taken for as many FLOPs as an H100
does meanwhile, and a level pays where a stack of its blocks saves more than the launches of a match, a merge and an
unmerge are worth. It is counted for one image, at a ratio of one half and at the size that the model is made for, and
nothing else is looked at: neither the ratio nor the size of a call changes which blocks are merged. A model without a
size in its config, as a ControlNet, is taken to have 64 x 64 tokens at its finest level, as Stable Diffusion has. The
finest level is always merged.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tome_fx.plan import FINEST, Grid, Plan, TransformError, downsampled

HALF = 0.5  # the ratio that is counted with
# The launches of a match, and those of a merge with its unmerge; and the FLOPs for one image that take as long as one
# launch: 3 us of about 400 TFLOP/s, shared by the two images of classifier-free guidance.
MATCH_LAUNCHES, MERGE_LAUNCHES = 7, 3
FLOPS_OF_A_LAUNCH = 6e8
PROMPT = 77  # tokens, as CLIP gives them
SIDE_OF_THE_FINEST = 64  # tokens, where the config does not say


@dataclass(frozen=True)
class Level:
    """The blocks of one token count, at the size that the model is made for. FLOPs are for one image and one stack.

    Args:
        downsample: Latents per token along a side.
        height: Rows of tokens.
        width: Columns of tokens.
        saved: FLOPs that merging half of the tokens saves.
        cost: What matching and merging cost, in FLOPs.
        merged: Whether it is merged at.
    """

    downsample: int
    height: int
    width: int
    saved: float
    cost: float
    merged: bool

    @property
    def pays(self) -> bool:
        """Whether merging saves more than it costs; see NOTE [Where merging pays]."""
        return self.saved > self.cost


def levels_of(model: nn.Module, stacks: Iterable[tuple[int, int, int]], plan: Plan) -> list[Level]:
    """The levels of a model, from the finest on, and which of them the plan reaches.

    Args:
        model: For its config.
        stacks: Of each stack of blocks its latents per token, its channels and how many blocks it has.
        plan: What is merged.

    Raises:
        TransformError: `max_downsample` is below the finest level.
    """
    by_downsample: dict[int, list[tuple[int, int]]] = {}
    for downsample, channels, depth in stacks:
        by_downsample.setdefault(downsample, []).append((channels, depth))
    finest = min(by_downsample)
    asked = plan.max_downsample
    if isinstance(asked, int) and asked < finest:
        raise TransformError(
            f"max_downsample={asked} reaches no block of {type(model).__name__}: its finest attention is at a "
            f"downsampling of {finest}; pass max_downsample={finest} or more, or {FINEST!r} for the finest"
        )
    levels = []
    for downsample, found in sorted(by_downsample.items()):
        grid = Grid(*_side(model, finest, downsample), plan.sx, plan.sy, HALF, tile=plan.tile)
        saved = max(saved_flops(grid, channels, depth, plan) for channels, depth in found)
        depth = max(depth for _, depth in found)
        matches, merges = (1 if plan.share_match else depth), (1 if plan.merge_block else depth)
        cost = FLOPS_OF_A_LAUNCH * (MATCH_LAUNCHES * matches + MERGE_LAUNCHES * merges)
        if asked is None:
            merged = downsample == finest or saved > cost
        else:
            merged = downsample <= (finest if asked == FINEST else int(asked))
        levels.append(Level(downsample, grid.height, grid.width, saved, cost, merged))
    return levels


def saved_flops(grid: Grid, channels: int, depth: int, plan: Plan) -> float:
    """FLOPs that a stack of blocks saves for one image, matching taken off; a multiply-add is two.

    Counted are attention, its four projections, and a feed-forward of four times the width with a gate, whose inputs
    are two.
    """
    tokens, kept = grid.tokens, grid.kept
    saved = 0.0
    if plan.merge_block or plan.merge_attn:
        queries = kept if plan.merge_queries else tokens
        projections = 2 if plan.merge_queries else 1  # keys and values; queries and outputs
        saved += 4 * channels * (tokens**2 - queries * kept) + 4 * channels**2 * (tokens - kept) * projections
    if plan.merge_block or plan.merge_crossattn:
        saved += (4 * channels * PROMPT + 4 * channels**2) * (tokens - kept)
    if plan.merge_block or plan.merge_mlp:
        saved += 24 * channels**2 * (tokens - kept)
    return depth * saved - grid.match_flops(channels) * (1 if plan.share_match else depth)


def _side(model: nn.Module, finest: int, downsample: int) -> tuple[int, int]:
    """Rows and columns of tokens at the size that the model is made for."""
    config: Any = model.config
    size = config.get("sample_size") or SIDE_OF_THE_FINEST * finest
    height, width = (size, size) if isinstance(size, int) else size
    return downsampled(height, downsample), downsampled(width, downsample)
