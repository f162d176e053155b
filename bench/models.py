"""Models to measure: real architectures from their configs, weights from a seed. Latency does not depend on weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tome_fx.families.registry import family_of

# Where a config departs from its class's defaults, which are Stable Diffusion 1's but for the context.
UNETS: dict[str, dict[str, Any]] = {
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
# Likewise, of transformers: the defaults are nearly those of PixArt-Σ XL, Flux.1 dev and Wan 2.1 14B.
SD3 = {"qk_norm": "rms_norm"}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixart": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "sd35-medium": (
        "SD3Transformer2DModel",
        SD3
        | {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "sd35-large": (
        "SD3Transformer2DModel",
        SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen": ("QwenImageTransformer2DModel", {}),
    "wan": ("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
    "wan-large": ("WanTransformer3DModel", {}),
    # The widths of the real ones with few of their blocks, for a CPU and for what is compiled
    "pixart-shallow": ("PixArtTransformer2DModel", {"caption_channels": 4096, "num_layers": 4}),
    "sd35-shallow": (
        "SD3Transformer2DModel",
        SD3
        | {"num_layers": 3, "num_attention_heads": 24, "caption_projection_dim": 1536, "dual_attention_layers": (0,)},
    ),
    "qwen-shallow": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    "flux-shallow": ("FluxTransformer2DModel", {"guidance_embeds": True, "num_layers": 1, "num_single_layers": 2}),
}
CONFIGS = {**{name: ("UNet2DConditionModel", config) for name, config in UNETS.items()}, **TRANSFORMERS}
Build = Callable[[str, str, torch.dtype], Any]  # `build`, or one that caches
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENT = 8  # image pixels along a side for one latent: Stable Diffusion's VAE, and those of the transformers


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A UNet or a transformer by the name of its config, with weights from a seed, or from a diffusers folder."""
    if name in CONFIGS:
        kind, config = CONFIGS[name]
        with torch.random.fork_rng(devices=[]), torch.device(device), _default(dtype):
            torch.manual_seed(0)
            model = getattr(diffusers, kind)(**config)
        if dtype != torch.float32:
            model.to(dtype)
        return model.eval().requires_grad_(False)
    if not Path(name).is_dir():
        raise ValueError(f"model must be one of {', '.join(CONFIGS)} or a diffusers folder, got {name!r}")
    part = next((part for part in ("unet", "transformer") if (Path(name) / part).is_dir()), None)
    model = AutoModel.from_pretrained(name, subfolder=part, torch_dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Values are made in half precision at once where it is asked for: there may be no room for them in float32."""
    before = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def inputs(model: nn.Module, resolution: int, batch: int) -> dict[str, Any]:
    """Seeded inputs for an image of `resolution` pixels a side; `batch` is the model's, guidance included."""
    side = resolution // LATENT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return example(model, side, side, batch)


def example(model: nn.Module, height: int, width: int, batch: int) -> dict[str, Any]:
    """Random inputs of the model's type and on its device, such as a pipeline would give it, at a latent size."""
    some = next(model.parameters())
    made = family_of(model).example_inputs(model, height, width, batch=batch, device=some.device)
    return tree_map(lambda value: value.to(some.dtype) if _is_real(value) else value, made)  # type: ignore[no-any-return]


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
