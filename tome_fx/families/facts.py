"""What is known of diffusion transformers, as data: a table by the names of diffusers' classes.

By name, since diffusers loads a model's file when it is asked for the model, and nobody should have to load them all.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tome_fx.families import grids, rotary, transformer_inputs, video_inputs
from tome_fx.graph.scopes import Adapted
from tome_fx.graph.structure import Returns
from tome_fx.plan import Plan


@dataclass(frozen=True)
class Facts:
    """A transformer of diffusers, whose blocks take and return image tokens `[B, N, C]` called `hidden_states`.

    Args:
        inputs: What makes inputs for it; see transformer_inputs.py.
        blocks: Names of its lists of blocks, in the order in which they run.
        grid_inputs: Names of the inputs that show where tokens lie.
        grid: What makes height and width of them, of a video the number of frames before them.
        line: What makes a line of them, where they are no image; see `Stack`.
        joint: Which of the lists have blocks whose tokens are text and image, in this order, and come back alone.
        result: Place of the image's tokens in what a block returns; None where it returns them alone.
        attention: Names of the attention modules in a block, the one whose keys are image tokens first.
        processor: What attention has that does not know its own, after `diffusers.models`.
        adapted: Arguments of a block with a row for each token, which it hands on to attention.
        own: Arguments of a block with a row for each token that it takes for itself: others where it is merged whole.
        weights: Name of the argument of a block that takes weights as a mask, where there is one.
        weigh: Another argument that carries weights. Where nobody asks for them, blocks whose attention cannot take
            them are given none.
        unweighed: Why merged tokens cannot be weighed; empty where they can be.
        per_token: Names of arguments with an entry for each token; see `Stack`.
        text: Tokens of a prompt, as its pipelines pad any by default; Qwen-Image's are not padded, and any number
            stands for them.
        packed: Latents per token along a side, where tokens are what is put in; None for the config's `patch_size`.
        calls: Functions that the model's graph calls instead of entering them.
        reads: Attributes that the model reads of its blocks.
        returns: Modules of the model with what tells the kinds of what they return, where it branches on these.
        frames: Latent frames of a video, as pipelines make by default; 0 of a model of images.
        cannot: Settings of the config with which a model cannot have merged tokens, each with the reason.
    """

    inputs: Callable[..., dict[str, Any]]
    blocks: tuple[str, ...]
    grid_inputs: tuple[str, ...]
    grid: Callable[..., tuple[int, ...]]
    line: Callable[..., Tensor] | None = None
    joint: tuple[str, ...] = ()
    result: int | None = 1
    attention: tuple[str, ...] = ("attn",)
    processor: str = "attention_processor.AttnProcessor2_0"
    adapted: tuple[Adapted, ...] = ()
    own: tuple[Adapted, ...] = ()
    weights: str | None = None
    weigh: Adapted | None = None
    unweighed: str = ""
    per_token: tuple[str, ...] = ()
    text: int = 77
    packed: int | None = None
    calls: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    returns: tuple[tuple[str, Returns], ...] = ()
    frames: int = 0
    cannot: tuple[tuple[str, str], ...] = ()

    def downsample(self, model: nn.Module) -> int:
        """Latents per token along a side."""
        return self.patch(model)[-1]

    def patch(self, model: nn.Module) -> tuple[int, ...]:
        """Latents per token along a side, and of a video frames per token before them."""
        config: Any = model.config
        size = config.patch_size if self.packed is None else self.packed
        sides = (config.get("patch_size_t") or 1, size) if isinstance(size, int) else (size[0], size[-1])
        return sides if self.frames else sides[1:]

    def result_of(self, model: nn.Module) -> int | None:
        """Place of the image's tokens in what a block returns: blocks without text return them alone."""
        return None if getattr(model, "context_embedder", ...) is None else self.result

    def adapted_for(self, plan: Plan) -> tuple[Adapted, ...]:
        """Arguments that are others for merged tokens, weights among them if they are wanted."""
        adapted = (*self.adapted, *self.own) if plan.merge_block else self.adapted
        if self.weigh is None or plan.prop_attn is False:
            return adapted
        return (*adapted, self.weigh if plan.prop_attn else replace(self.weigh, chosen=rotary.where_taken))


def of_condition_of_wan(timestep: Any, text: Any, image: Any, timestep_seq_len: Any = None) -> tuple[Hashable, ...]:
    """Kinds of what Wan makes of its conditions: two of the time step, for each token or for all, text, an image."""
    time = "2d" if timestep_seq_len is None else "3d"
    return time, time, "3d", None if image is None else "3d"


SD3 = Facts(
    transformer_inputs.of_sd3,
    blocks=("transformer_blocks",),
    grid_inputs=("hidden_states",),
    grid=grids.grid_of_patches,
    attention=("attn", "attn2"),
    processor="attention_processor.JointAttnProcessor2_0",
    unweighed="takes no mask, by which merged tokens would be weighed",
    text=77 + 256,  # of CLIP and of T5
    reads=("context_pre_only",),
)
FLUX = Facts(
    transformer_inputs.of_flux,
    blocks=("transformer_blocks", "single_transformer_blocks"),
    grid_inputs=("img_ids",),
    grid=grids.row_of_coordinates,
    line=grids.line_of_coordinates,
    adapted=(Adapted("image_rotary_emb", rotary.after_text),),
    weigh=Adapted("joint_attention_kwargs", rotary.weights_after_text, ("image_rotary_emb", "encoder_hidden_states")),
    per_token=("joint_attention_kwargs.attention_mask", "joint_attention_kwargs.ip_adapter_masks"),
    text=512,
    packed=transformer_inputs.PACKED,
)
NOT_HANDED = "takes no mask from its block, by which merged tokens would be weighed"
FLUX2 = ("image_rotary_emb", "temb_mod", "temb_mod_img")  # of which a block has one of the latter
FACTS: dict[str, Facts] = {
    "PixArtTransformer2DModel": Facts(
        transformer_inputs.of_pixart,
        blocks=("transformer_blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_patches,
        result=None,
        attention=("attn1", "attn2"),
        weights="attention_mask",
        per_token=("attention_mask", "cross_attention_kwargs.ip_adapter_masks"),
        text=300,  # of Sigma; 120 of Alpha
    ),
    "SD3Transformer2DModel": SD3,
    # Of one without an embedding of places the tokens are put in, but for those of its picture.
    "SD3ControlNetModel": replace(SD3, inputs=transformer_inputs.of_sd3_controlnet, grid_inputs=("controlnet_cond",)),
    "FluxTransformer2DModel": FLUX,
    "FluxControlNetModel": replace(FLUX, inputs=transformer_inputs.of_flux_controlnet),
    "QwenImageTransformer2DModel": Facts(
        transformer_inputs.of_qwen,
        blocks=("transformer_blocks",),
        grid_inputs=("img_shapes",),
        grid=grids.row_of_shapes,
        line=grids.line_of_shapes,
        processor="transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0",
        adapted=(Adapted("image_rotary_emb", rotary.beside_text),),
        unweighed="takes no mask but that of the text, and merged tokens would be weighed by one",
        packed=transformer_inputs.PACKED,
        calls=("compute_text_seq_len_from_mask",),
        cannot=(("zero_cond_t", "its forward goes through the sizes of pictures one by one, which no graph can"),),
    ),
    "ChromaTransformer2DModel": Facts(
        transformer_inputs.of_chroma,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        joint=("single_transformer_blocks",),
        grid_inputs=("img_ids",),
        grid=grids.row_of_coordinates,
        line=grids.line_of_coordinates,
        adapted=(
            Adapted("image_rotary_emb", rotary.after_text),
            Adapted("attention_mask", rotary.mask_after_text),
        ),
        unweighed="takes no mask but the product of one with itself, and merged tokens would be weighed by one",
        text=512,
        packed=transformer_inputs.PACKED,
    ),
    "Flux2Transformer2DModel": Facts(
        transformer_inputs.of_flux2,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        joint=("single_transformer_blocks",),
        grid_inputs=("img_ids",),
        grid=grids.row_of_coordinates,
        line=grids.line_of_coordinates_and_layer,
        adapted=(Adapted("image_rotary_emb", rotary.after_text),),
        weigh=Adapted("joint_attention_kwargs", rotary.weights_after_text, FLUX2),
        per_token=("joint_attention_kwargs.attention_mask",),
        text=512,
        packed=transformer_inputs.PACKED,
    ),
    "AuraFlowTransformer2DModel": Facts(
        transformer_inputs.of_auraflow,
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        joint=("single_transformer_blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_patches,
        processor="attention_processor.AuraFlowAttnProcessor2_0",
        unweighed="takes no mask, by which merged tokens would be weighed",
        text=256,
        calls=("maybe_adjust_dtype_for_device",),
    ),
    "CogView4Transformer2DModel": Facts(
        transformer_inputs.of_cogview4,
        blocks=("transformer_blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_patches,
        result=0,
        attention=("attn1",),
        processor="transformers.transformer_cogview4.CogView4AttnProcessor",
        adapted=(Adapted("image_rotary_emb", rotary.of_image),),
        unweighed="takes no mask but that of the text, and merged tokens would be weighed by one",
    ),
    "HunyuanDiT2DModel": Facts(
        transformer_inputs.of_hunyuan_dit,
        blocks=("blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_patches,
        result=None,
        attention=("attn1", "attn2"),
        processor="attention_processor.HunyuanAttnProcessor2_0",
        adapted=(Adapted("image_rotary_emb", rotary.of_image),),
        own=(Adapted("skip", rotary.merged),),
        unweighed=NOT_HANDED,
        reads=("patch_size",),
    ),
    "CogVideoXTransformer3DModel": Facts(
        video_inputs.of_cogvideox,
        blocks=("transformer_blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_frames_before_channels,
        result=0,
        attention=("attn1",),
        processor="attention_processor.CogVideoXAttnProcessor2_0",
        adapted=(Adapted("image_rotary_emb", rotary.of_image),),
        weigh=Adapted("attention_kwargs", rotary.weights_beside_text, ("encoder_hidden_states",)),
        per_token=("attention_kwargs.attention_mask",),
        text=226,
        frames=13,
    ),
    "LTXVideoTransformer3DModel": Facts(
        video_inputs.of_ltx,
        blocks=("transformer_blocks",),
        grid_inputs=("num_frames", "height", "width"),
        grid=grids.grid_as_told,
        result=None,
        attention=("attn1", "attn2"),
        adapted=(Adapted("image_rotary_emb", rotary.of_each),),
        own=(Adapted("temb", rotary.of_each_unless_one),),
        unweighed=NOT_HANDED,
        text=128,
        frames=21,
    ),
    "WanTransformer3DModel": Facts(
        video_inputs.of_wan,
        blocks=("blocks",),
        grid_inputs=("hidden_states",),
        grid=grids.grid_of_frames,
        result=None,
        attention=("attn1", "attn2"),
        adapted=(Adapted("rotary_emb", rotary.of_each),),
        own=(Adapted("temb", rotary.of_each_where_many),),
        unweighed=NOT_HANDED,
        text=512,
        returns=(("condition_embedder", of_condition_of_wan),),
        frames=21,
    ),
}

# Transformers that cannot have merged tokens in whole blocks, and why.
CANNOT = {
    "SanaTransformer2DModel": "its feed-forwards are convolutions over the grid, on which merged tokens do not lie",
    "SanaControlNetModel": "its feed-forwards are convolutions over the grid, on which merged tokens do not lie",
    "ZImageTransformer2DModel": "its forward takes lists of images apart by their values, which no graph can",
    "HunyuanVideoTransformer3DModel": "its forward makes a mask of a size that it counts, which cannot be traced",
    "Lumina2Transformer2DModel": "its forward goes by the lengths of prompts, which are data, and breaks a graph",
}
