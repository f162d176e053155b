"""Random inputs for transformers of videos, as in transformer_inputs.py; `frames` are latent ones."""

import math
from typing import Any

import torch

from tome_fx.families.transformer_inputs import Random, table_of_places

SEEN = 257  # tokens of an image that Wan is told, by CLIP


def of_cogvideox(model: Any, height: int, width: int, text_tokens: int, random: Random, frames: int) -> dict[str, Any]:
    """Of CogVideoX: a video with its table of places, a prompt, a time step, and a number for those told one."""
    config = model.config
    inputs: dict[str, Any] = {
        "hidden_states": random(frames, config.in_channels, height, width),
        "encoder_hidden_states": random(text_tokens, config.text_embed_dim),
        "timestep": random().abs(),
    }
    if config.use_rotary_positional_embeddings:
        count = frames // (config.patch_size_t or 1) * (height // config.patch_size) * (width // config.patch_size)
        inputs["image_rotary_emb"] = table_of_places(model, count, inputs["timestep"])
    return inputs if config.ofs_embed_dim is None else {**inputs, "ofs": torch.ones_like(inputs["timestep"])}


def of_ltx(model: Any, height: int, width: int, text_tokens: int, random: Random, frames: int) -> dict[str, Any]:
    """Of LTX-Video: the tokens of a video and its sides, a prompt with its mask, a time step."""
    config = model.config
    sides = frames // config.patch_size_t, height // config.patch_size, width // config.patch_size
    prompt = random(text_tokens, config.caption_channels)
    return {
        "hidden_states": random(math.prod(sides), config.in_channels),
        "encoder_hidden_states": prompt,
        "timestep": random().abs(),
        "encoder_attention_mask": torch.ones_like(prompt[..., 0]),
        **dict(zip(("num_frames", "height", "width"), sides, strict=True)),
    }


def of_wan(model: Any, height: int, width: int, text_tokens: int, random: Random, frames: int) -> dict[str, Any]:
    """Of Wan: a video, a time step, a prompt, and an image for a model that is told one."""
    config = model.config
    inputs = {
        "hidden_states": random(config.in_channels, frames, height, width),
        "timestep": random().abs(),
        "encoder_hidden_states": random(text_tokens, config.text_dim),
    }
    return (
        inputs
        if config.image_dim is None
        else {**inputs, "encoder_hidden_states_image": random(SEEN, config.image_dim)}
    )
