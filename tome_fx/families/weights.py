"""Where merged tokens can be weighed by how many they stand for: which attention takes weights, and in which form.

NOTE [Weights as a channel]
The logarithm of a slot's size is added to the scores of its key. A mask does that, and some of a GPU's kernels take
none: a mask costs FlashAttention. On devices of compute capability 9.x and 10.x torch takes cuDNN's kernels, which take
a mask, for heads of up to 128 channels. A channel does it as well: with one more of a constant c in the queries, and
log(size) / (c * scale) in the keys, their product is the same sum. It is exact to the rounding of one number, as the
mask is; c is a power of two near 1 / scale, so that no other rounding comes in. Values get a channel of zeros, which is
cut off, for FlashAttention wants equal widths.

FlashAttention's kernels are made for heads of 32, 64, 96, 128, 192 and 256 channels, and others run as the next of
these. So the channel is free where it is one of those that would be filled up anyway: for heads of 40, 80 and 160, as
Stable Diffusion 1 has them, and not for those of 64. The rule: a channel on a CUDA device of capability 8.0 or above,
for half precision, where cuDNN has no kernel and the head stays within that of FlashAttention; a mask everywhere else.

Source of the channel: "FlashBias" (2025), arXiv 2505.12044.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tome_fx import ops
from tome_fx.families import maps
from tome_fx.graph.scopes import Weigh
from tome_fx.ops.tiling import once

# Processors that take a mask and cannot weigh by it, each with the reason.
CANNOT_WEIGH = {
    **dict.fromkeys(  # of perturbed-attention guidance and of text-to-video zero
        (
            "PAGIdentitySelfAttnProcessor2_0",
            "PAGCFGIdentitySelfAttnProcessor2_0",
            "CrossFrameAttnProcessor",
            "CrossFrameAttnProcessor2_0",
        ),
        "attends in parts of the batch or across it, and would mix up the weights of its images",
    ),
    "FusedCogVideoXAttnProcessor2_0": "pads a mask by the length of the text, even one that has entries for the text",
}


NATIVE = "native"
MASKED = (NATIVE, "_native_cudnn", "_native_efficient", "_native_math", "_native_npu")  # which add a mask to scores


class Passing(type):
    """The type of a class that passes for the one it is derived from where diffusers looks for that one.

    In its registers too, as that of layer skipping: they are dicts.
    """

    def __hash__(cls) -> int:
        """That of the class it is derived from."""
        return hash(cls.__base__)

    def __eq__(cls, other: object) -> bool:
        """Whether the other class is this one or the one it is derived from."""
        return other is cls or other is cls.__base__


def why_unweighed(attention: nn.Module) -> str:
    """Why attention, as it is, cannot weigh its keys by a mask, in words to follow its processor's name; or empty."""
    processor = getattr(attention, "processor", None)
    if getattr(attention, "is_cross_attention", False):
        return "attends to the prompt, whose tokens are not merged"
    if reason := CANNOT_WEIGH.get(type(processor).__name__):
        return reason
    if processor is not None and maps.ignores(type(processor), "attention_mask"):
        return "takes no notice of attention_mask"
    backend = _backend(processor)
    return "" if backend in MASKED else f"goes by the attention backend {backend}, which adds no mask to scores"


def _backend(processor: Any) -> str:
    """The attention backend of diffusers that a processor goes by: its own, or the one that is set for all."""
    if not hasattr(processor, "_attention_backend"):
        return NATIVE
    backend = processor._attention_backend or attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    return backend.value if isinstance(backend, attention_dispatch.AttentionBackendName) else str(backend)


def why_unweighed_by_default(attention: nn.Module) -> str:
    """The same where nobody has asked for weights: processors that are none of diffusers' may attend to other keys."""
    processor = getattr(attention, "processor", None)
    if not isinstance(processor, WeighingProcessor) and not type(processor).__module__.startswith("diffusers."):
        return "is none of diffusers', and may attend to other keys than it is given"
    return why_unweighed(attention)


def weights(attention: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """What attention adds to the scores of its merged keys, `[B * heads, 1, K]`; a node of rewritten graphs."""
    return ops.log_sizes(tokens, slots, attention.heads)  # type: ignore[arg-type]


def weights_where_taken(attention: nn.Module, tokens: Tensor, slots: ops.SlotMap | None) -> Tensor | None:
    """The same, or None where weights cannot be taken; a node of rewritten graphs."""
    return None if why_unweighed_by_default(attention) else weights(attention, tokens, slots)


class WeighingProcessor(AttnProcessor2_0, metaclass=Passing):  # type: ignore[misc]
    """diffusers' own, which takes a mask as a channel where that is faster: see NOTE [Weights as a channel]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Weights are a mask of `[B * heads, 1, K]`, the same for every query."""
        given = (hidden_states, encoder_hidden_states, attention_mask, temb, *args)
        heads = attn.heads
        if attention_mask is None or attention_mask.shape[:2] != (hidden_states.shape[0] * heads, 1):
            return super().__call__(attn, *given, **kwargs)  # type: ignore[no-any-return]
        device, dtype = hidden_states.device, hidden_states.dtype
        if not _is_plain(attn) or not faster_as_channel(device, dtype, attn.inner_dim // heads):
            return super().__call__(attn, *given, **kwargs)  # type: ignore[no-any-return]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in projected)
        attended = attend_by_channel(query, key, value, attention_mask.unflatten(0, (-1, heads)))
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def attend_by_channel(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Attention with weights added to the scores of the keys, without a mask: see NOTE [Weights as a channel].

    Args:
        query: `[B, heads, Q, D]`.
        key: `[B, heads, K, D]`.
        value: `[B, heads, K, D]`.
        weights: `[B, heads, 1, K]`.

    Returns:
        `[B, heads, Q, D]`.
    """
    width = query.shape[-1]
    scale = width**-0.5
    constant = 2.0 ** round(-math.log2(scale))
    weights = weights / (constant * scale)
    if statically_known_true(query.shape[2] == key.shape[2]):
        query, key, value = _widen((query, key, value), (constant, weights, 0.0))
    else:
        (query,), (key, value) = _widen((query,), (constant,)), _widen((key, value), (weights, 0.0))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :width]


def _widen(tensors: tuple[Tensor, ...], channels: tuple[Tensor | float, ...]) -> Tensor:
    """Tensors `[B, heads, N, D]`, each with its channel and then zeros up to the widened head, stacked.

    Stacked and written down once they are one launch, in place of one and more for each.
    """
    stacked = torch.stack([tensor.transpose(1, 2) for tensor in tensors])
    width = stacked.shape[-1]
    wide = F.pad(stacked, (0, _widened(width) - width))
    number = torch.arange(len(tensors), device=wide.device).view(-1, 1, 1, 1, 1)
    channel = wide.new_zeros(())
    for index, given in enumerate(channels):
        values = given.permute(0, 3, 1, 2) if isinstance(given, Tensor) else given
        channel = torch.where(number == index, values, channel)
    place = torch.arange(wide.shape[-1], device=wide.device)
    return once(torch.where(place == width, channel, wide).contiguous()).transpose(2, 3)


FLASH_WIDTHS = (32, 64, 96, 128, 192, 256)
CUDNN, CUDNN_WIDTH = (9, 10), 128  # the compute capabilities, in their major number, and the widest head


def _widened(width: int) -> int:
    """The width of a head with one more channel: FlashAttention wants a multiple of 8."""
    return (width + 8) // 8 * 8


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def faster_as_channel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """The rule of NOTE [Weights as a channel], for the channels of a head."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    kernels = [next((w for w in FLASH_WIDTHS if w >= size), None) for size in (width, _widened(width))]
    major = torch.cuda.get_device_capability(device)[0]
    by_flash = major >= 8 and not (major in CUDNN and width <= CUDNN_WIDTH)
    return by_flash and None not in kernels and len(set(kernels)) == 1


def _is_plain(attention: Any) -> bool:
    """Whether attention is projections around a product, as that of a block over image tokens is."""
    parts = ("spatial_norm", "group_norm", "norm_q", "norm_k")
    plain = all(getattr(attention, part, None) is None for part in parts)
    return plain and not attention.residual_connection and attention.rescale_output_factor == 1


# What a pass is to weigh with, by what `prop_attn` asks for
WEIGH: dict[bool | None, Weigh | None] = {True: weights, None: weights_where_taken, False: None}
