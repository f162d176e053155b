"""Small real diffusion transformers with seeded random weights, and what they are given.

A builder returns the same object every time, as those of `support.models` do.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    CogView4Transformer2DModel,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from tome_fx.families.registry import family_of

SIDE = 16  # latents, so 8 x 8 tokens
TEXT = 5
FRAMES = 3  # of a video


def _built(make: Callable[[], Any], louder: float = 1.0) -> Any:
    """A model whose weights are random everywhere, those of attention times a number: what is zero has an effect."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")  # by diffusers' own ControlNet
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
        for name, parameter in model.named_parameters():
            if "attn." in name:
                parameter.data.mul_(louder)
    return model


@functools.cache
def pixart() -> PixArtTransformer2DModel:
    """PixArt in small."""
    return _built(
        lambda: PixArtTransformer2DModel(
            sample_size=SIDE,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            in_channels=4,
            out_channels=8,
        )
    )


SD3_CONFIG: dict[str, Any] = {
    "sample_size": SIDE,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "in_channels": 4,
    "out_channels": 4,
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
}


@functools.cache
def sd3() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 in small: the first two blocks have a second attention, over the image alone."""
    return _built(lambda: SD3Transformer2DModel(**SD3_CONFIG, dual_attention_layers=(0, 1)))


@functools.cache
def sd3_controlnet() -> SD3ControlNetModel:
    """A ControlNet for `sd3()` of two blocks."""
    return _built(lambda: SD3ControlNetModel(**{**SD3_CONFIG, "num_layers": 2}))


@functools.cache
def sd3_controlnet_without_text() -> SD3ControlNetModel:
    """As those of Stable Diffusion 3.5 large: no text and no embedding of places, so that tokens are put in."""
    config = {**SD3_CONFIG, "num_layers": 2, "joint_attention_dim": None, "qk_norm": None}
    return _built(lambda: SD3ControlNetModel(**config, use_pos_embed=False, pos_embed_type=None))


FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}


@functools.cache
def flux() -> FluxTransformer2DModel:
    """Flux in small, with guidance as an input."""
    return _built(lambda: FluxTransformer2DModel(**FLUX_CONFIG, guidance_embeds=True))


@functools.cache
def flux_controlnet() -> FluxControlNetModel:
    """A ControlNet for `flux()` of one block of each kind."""
    config = {**FLUX_CONFIG, "num_layers": 1, "num_single_layers": 1}
    return _built(lambda: FluxControlNetModel(**config, guidance_embeds=True, num_mode=3))


@functools.cache
def qwen() -> QwenImageTransformer2DModel:
    """Qwen-Image in small."""
    return _built(
        lambda: QwenImageTransformer2DModel(
            in_channels=8,
            out_channels=2,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
        )
    )


@functools.cache
def chroma() -> ChromaTransformer2DModel:
    """Chroma in small."""
    return _built(
        lambda: ChromaTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )


@functools.cache
def flux2() -> Flux2Transformer2DModel:
    """Flux.2 in small."""
    return _built(
        lambda: Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    )


@functools.cache
def auraflow() -> AuraFlowTransformer2DModel:
    """AuraFlow in small."""
    return _built(
        lambda: AuraFlowTransformer2DModel(
            sample_size=SIDE,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
        ),
        louder=4.0,  # its attention adds little by these
    )


@functools.cache
def cogview4() -> CogView4Transformer2DModel:
    """CogView 4 in small."""
    return _built(
        lambda: CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=12,
            time_embed_dim=16,
            condition_dim=4,
            sample_size=SIDE,
            rope_axes_dim=(16, 16),
        )
    )


@functools.cache
def hunyuan_dit() -> HunyuanDiT2DModel:
    """Hunyuan-DiT in small: its last block takes what its first gave."""
    return _built(
        lambda: HunyuanDiT2DModel(
            in_channels=4,
            patch_size=2,
            sample_size=SIDE,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            hidden_size=16,
            cross_attention_dim=12,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=4,
            text_len_t5=4,
        )
    )


@functools.cache
def cogvideox() -> CogVideoXTransformer3DModel:
    """CogVideoX in small."""
    return _built(
        lambda: CogVideoXTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            time_embed_dim=8,
            text_embed_dim=12,
            use_rotary_positional_embeddings=True,
        )
    )


@functools.cache
def ltx(patch: int = 2) -> LTXVideoTransformer3DModel:
    """LTX-Video in small, with tokens as wide as others have here, and not as its own."""
    return _built(
        lambda: LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            patch_size=patch,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            cross_attention_dim=24,
            caption_channels=12,
        )
    )


WAN_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 48,
    "rope_max_seq_len": 32,
}


@functools.cache
def wan() -> WanTransformer3DModel:
    """Wan in small."""
    return _built(lambda: WanTransformer3DModel(**WAN_CONFIG))


@functools.cache
def wan_of_an_image() -> WanTransformer3DModel:
    """Wan that is told an image, whose processors take 512 tokens of a prompt for granted."""
    return _built(lambda: WanTransformer3DModel(**WAN_CONFIG, image_dim=6, added_kv_proj_dim=24))


MODELS: dict[str, Callable[[], Any]] = {
    "pixart": pixart,
    "sd3": sd3,
    "sd3_controlnet": sd3_controlnet,
    "sd3_controlnet_without_text": sd3_controlnet_without_text,
    "flux": flux,
    "flux_controlnet": flux_controlnet,
    "qwen": qwen,
    "chroma": chroma,
    "flux2": flux2,
    "auraflow": auraflow,
    "cogview4": cogview4,
    "hunyuan_dit": hunyuan_dit,
    "wan": wan,
    "cogvideox": cogvideox,
    "ltx": ltx,
}


def frames_of(model: Any) -> int:
    """Frames of what the model is given here."""
    return FRAMES if "3DModel" in type(model).__name__ else 1


def inputs(
    model: Any, height: int = SIDE, width: int = SIDE, *, batch: int = 2, seed: int = 0, text: int | None = None
) -> dict[str, Any]:
    """Arguments for a forward of the model, in its dtype: the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"text_tokens": TEXT if text is None else text, "frames": frames_of(model)}
        found = family_of(model).example_inputs(model, height, width, batch=batch, **options)  # type: ignore[arg-type]
    return {name: _cast(value, model.dtype) for name, value in found.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def one_of(arguments: dict[str, Any], image: int) -> dict[str, Any]:
    """The arguments of one image of a batch; coordinates are those of all."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            result[name] = one_of(value, image)
        elif isinstance(value, (Tensor, list)) and name not in ("img_ids", "txt_ids"):
            result[name] = value[image : image + 1]
        else:
            result[name] = value
    return result


def output(model: Any, arguments: dict[str, Any]) -> Tensor:
    """What the model makes of the arguments, without gradients; of a ControlNet, all residuals in one row."""
    with torch.no_grad():
        return flattened(model(**arguments, return_dict=False))


def flattened(result: Any) -> Tensor:
    """A tensor itself, or all of them in one row."""
    (result,) = result if len(result) == 1 else (result,)
    if isinstance(result, Tensor):
        return result
    return torch.cat([part.flatten() for group in result for part in ([group] if isinstance(group, Tensor) else group)])
