"""UNets to measure: real architectures from their configs, weights from a seed. Latency does not depend on weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tome_fx.families.inputs import example_inputs

# Where a config departs from UNet2DConditionModel's defaults, which are Stable Diffusion 1's but for the context.
CONFIGS: dict[str, dict[str, Any]] = {
    # Small enough for a laptop, wide enough at its finest level that attention is what costs, as at high resolution.
    "tiny": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    },
    "sd15": {"cross_attention_dim": 768},
    "sd21": {
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENT = 8  # image pixels along a side for one latent: Stable Diffusion's VAE


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet by the name of its config, with weights from a seed, or from a diffusers folder."""
    if name in CONFIGS:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(**CONFIGS[name])
        if dtype != torch.float32:
            unet.to(dtype)
        return unet.eval().requires_grad_(False)
    if not Path(name).is_dir():
        raise ValueError(f"model must be one of {', '.join(CONFIGS)} or a diffusers folder, got {name!r}")
    folder = "unet" if (Path(name) / "unet").is_dir() else None
    unet = UNet2DConditionModel.from_pretrained(name, subfolder=folder, torch_dtype=dtype)
    return unet.to(device).eval().requires_grad_(False)


def inputs(unet: UNet2DConditionModel, resolution: int, batch: int) -> dict[str, Any]:
    """Seeded inputs for an image of `resolution` pixels a side; `batch` is the UNet's, guidance included."""
    side = resolution // LATENT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return example_inputs(unet, side, side, batch=batch, device=unet.device, dtype=unet.dtype)


def pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A pipeline around the UNet that takes prompt embeddings, for it has no text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        widths = (64, 64, 64, 64) if unet.config.block_out_channels[0] < 320 else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1 if widths[0] == 64 else 2,
            latent_channels=4,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )
    return assemble(unet, vae.to(unet.device, unet.dtype).eval(), scheduler)


def assemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    text_encoder: Any = None,
    tokenizer: Any = None,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of its parts, without a safety checker."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
