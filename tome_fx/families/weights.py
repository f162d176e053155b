"""Where merged tokens can be weighed by how many they stand for: which attention takes weights, and in which form."""

from torch import Tensor, nn

from tome_fx import ops
from tome_fx.families import maps
from tome_fx.graph.scopes import Weigh

# Of perturbed-attention guidance and of text-to-video zero: they attend in parts of the batch, or across it, and would
# give some images the weights of others.
MIXING_PROCESSORS = (
    "PAGIdentitySelfAttnProcessor2_0",
    "PAGCFGIdentitySelfAttnProcessor2_0",
    "CrossFrameAttnProcessor",
    "CrossFrameAttnProcessor2_0",
)


def why_unweighed(attention: nn.Module) -> str:
    """Why attention, as it is, cannot weigh its keys by a mask, in words to follow its processor's name; or empty."""
    processor = getattr(attention, "processor", None)
    if getattr(attention, "is_cross_attention", False):
        return "attends to the prompt, whose tokens are not merged"
    if type(processor).__name__ in MIXING_PROCESSORS:
        return "attends in parts of the batch or across it, and would mix up the weights of its images"
    if processor is not None and maps.ignores(type(processor), "attention_mask"):
        return "takes no notice of attention_mask"
    return ""


def why_unweighed_by_default(attention: nn.Module) -> str:
    """The same where nobody has asked for weights: processors that are none of diffusers' may attend to other keys."""
    processor = getattr(attention, "processor", None)
    if not type(processor).__module__.startswith("diffusers."):
        return "is none of diffusers', and may attend to other keys than it is given"
    return why_unweighed(attention)


def weights(attention: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """What attention adds to the scores of its merged keys, `[B * heads, 1, K]`; a node of rewritten graphs."""
    return ops.log_sizes(tokens, slots, attention.heads)  # type: ignore[arg-type]


def weights_where_taken(attention: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """The same, or None where weights cannot be taken; a node of rewritten graphs."""
    return None if why_unweighed_by_default(attention) else weights(attention, tokens, slots)


def weights_of_block(block: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """As `weights`, for a block that hands them to its self-attention; a node of rewritten graphs."""
    return weights(block.attn1, tokens, slots)  # type: ignore[arg-type]


def weights_of_block_where_taken(block: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """As `weights_where_taken`, for a block that hands them to its self-attention; a node of rewritten graphs."""
    return weights_where_taken(block.attn1, tokens, slots)  # type: ignore[arg-type]


# What a pass is to weigh with, for attention and for whole blocks, by what `prop_attn` asks for
WEIGH: dict[bool | None, tuple[Weigh | None, Weigh | None]] = {
    True: (weights, weights_of_block),
    None: (weights_where_taken, weights_of_block_where_taken),
    False: (None, None),
}
