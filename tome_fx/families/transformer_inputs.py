"""Random inputs for diffusion transformers, from their configs: for `explain`, the first trace, and the tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PACKED = 2  # latents along a side of a token that is put in as such: pipelines pack squares of them
PIXELS = 8  # of a latent along a side

Random = Callable[..., Tensor]  # of a shape without the batch


def of_pixart(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of PixArt: an image, a prompt, a time step, and the sizes that models of 1024 pixels are told."""
    config = model.config
    more = {"resolution": random(2), "aspect_ratio": random(1)} if model.use_additional_conditions else {}
    return {
        "hidden_states": random(config.in_channels, height, width),
        "encoder_hidden_states": random(text_tokens, config.caption_channels or config.cross_attention_dim),
        "timestep": random().abs(),
        "added_cond_kwargs": more or {"resolution": None, "aspect_ratio": None},
    }


def of_sd3(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Stable Diffusion 3: an image, a prompt, what is left of it as a whole, and a time step."""
    config = model.config
    return {
        "hidden_states": random(config.in_channels, height, width),
        "encoder_hidden_states": random(text_tokens, config.joint_attention_dim),
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": random().abs(),
    }


def of_sd3_controlnet(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """The same and a picture. One without text has no prompt, and one without an embedding of places takes tokens."""
    config = model.config
    inputs = {
        "hidden_states": random(config.in_channels, height, width),
        "controlnet_cond": random(config.in_channels + config.extra_conditioning_channels, height, width),
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": random().abs(),
    }
    if model.pos_embed is None:
        inputs["hidden_states"] = random(height // config.patch_size * (width // config.patch_size), model.inner_dim)
    if model.context_embedder is not None:
        inputs["encoder_hidden_states"] = random(text_tokens, config.joint_attention_dim)
    return inputs


def of_flux(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Flux: tokens with their coordinates, a prompt, what is left of it as a whole, a time step, guidance."""
    config = model.config
    rows, columns = height // PACKED, width // PACKED
    prompt = random(text_tokens, config.joint_attention_dim)
    inputs = {
        "hidden_states": random(rows * columns, config.in_channels),
        "encoder_hidden_states": prompt,
        "pooled_projections": random(config.pooled_projection_dim),
        "timestep": random().abs(),
        "img_ids": _coordinates(rows, columns, prompt),
        "txt_ids": prompt.new_zeros(text_tokens, 3),
    }
    return {**inputs, "guidance": random().abs()} if config.guidance_embeds else inputs


def of_flux_controlnet(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """The same and a picture, as tokens or in pixels, and its kind for a model of several."""
    inputs = of_flux(model, height, width, text_tokens, random)
    inputs["controlnet_cond"] = torch.randn_like(inputs["hidden_states"])
    if model.input_hint_block is not None:
        inputs["controlnet_cond"] = random(3, height * PIXELS, width * PIXELS)
    if model.union:
        inputs["controlnet_mode"] = torch.zeros_like(inputs["timestep"][:, None], dtype=torch.long)
    return inputs


def of_chroma(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Chroma: tokens with their coordinates, a prompt whose last token is masked, a time step."""
    config = model.config
    rows, columns = height // PACKED, width // PACKED
    prompt = random(text_tokens, config.joint_attention_dim)
    mask = prompt.new_ones(prompt.shape[0], text_tokens + rows * columns)
    mask[:, text_tokens - 1] = 0
    return {
        "hidden_states": random(rows * columns, config.in_channels),
        "encoder_hidden_states": prompt,
        "timestep": random().abs(),
        "img_ids": _coordinates(rows, columns, prompt),
        "txt_ids": prompt.new_zeros(text_tokens, 3),
        "attention_mask": mask,
    }


def of_flux2(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Flux.2: tokens with their coordinates, a prompt with its own, a time step, guidance."""
    config = model.config
    rows, columns = height // PACKED, width // PACKED
    prompt = random(text_tokens, config.joint_attention_dim)
    place = _coordinates(rows, columns, prompt)
    word = torch.arange(text_tokens, device=prompt.device)[:, None].to(prompt.dtype)
    inputs = {
        "hidden_states": random(rows * columns, config.in_channels),
        "encoder_hidden_states": prompt,
        "timestep": random().abs(),
        "img_ids": torch.cat([place, place[:, :1]], dim=1),
        "txt_ids": torch.cat([prompt.new_zeros(text_tokens, 3), word], dim=1),
    }
    return {**inputs, "guidance": random().abs()} if config.guidance_embeds else inputs


def _coordinates(rows: int, columns: int, like: Tensor) -> Tensor:
    """Those of the tokens of a picture, `[N, 3]`: 0, row, column."""
    place = torch.arange(rows * columns, device=like.device)
    return torch.stack([place * 0, place // columns, place % columns], dim=1).to(like.dtype)


def of_qwen(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Qwen-Image: tokens, the sizes of their pictures, a prompt, a time step."""
    config = model.config
    rows, columns = height // PACKED, width // PACKED
    tokens = random(rows * columns, config.in_channels)
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": random(text_tokens, config.joint_attention_dim),
        "timestep": random().abs(),
        "img_shapes": [[(1, rows, columns)]] * tokens.shape[0],
    }


def of_auraflow(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of AuraFlow: an image, a prompt, a time step."""
    config = model.config
    return {
        "hidden_states": random(config.in_channels, height, width),
        "encoder_hidden_states": random(text_tokens, config.joint_attention_dim),
        "timestep": random().abs(),
    }


def of_cogview4(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of CogView 4: an image, a prompt, a time step, and the sizes that it is told."""
    config = model.config
    return {
        "hidden_states": random(config.in_channels, height, width),
        "encoder_hidden_states": random(text_tokens, config.text_embed_dim),
        "timestep": random().abs(),
        "original_size": random(2),
        "target_size": random(2),
        "crop_coords": random(2),
    }


def of_hunyuan_dit(model: Any, height: int, width: int, text_tokens: int, random: Random) -> dict[str, Any]:
    """Of Hunyuan-DiT: an image with its table of places, a time step, two prompts as long as the model is made for."""
    config = model.config
    prompt, second = (
        random(config.text_len, config.cross_attention_dim),
        random(config.text_len_t5, config.cross_attention_dim_t5),
    )
    inputs = {
        "hidden_states": random(config.in_channels, height, width),
        "timestep": random().abs(),
        "encoder_hidden_states": prompt,
        "text_embedding_mask": torch.ones_like(prompt[..., 0]),
        "encoder_hidden_states_t5": second,
        "text_embedding_mask_t5": torch.ones_like(second[..., 0]),
        "image_rotary_emb": table_of_places(model, height // config.patch_size * (width // config.patch_size), prompt),
    }
    if not config.use_style_cond_and_image_meta_size:
        return inputs
    style = torch.zeros_like(prompt[:, 0, 0], dtype=torch.long)
    return {**inputs, "image_meta_size": random(6), "style": style}


def table_of_places(model: Any, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for as many tokens as these, in a row."""
    place, channel = (
        torch.arange(size, dtype=torch.float32, device=like.device) for size in (count, model.config.attention_head_dim)
    )
    angle = place[:, None] / (channel + 1)
    return angle.cos(), angle.sin()
