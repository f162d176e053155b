"""Small diffusers pipelines on disk, under the names that pages load, so that a page's `from_pretrained` reads them.

A name with a slash is a folder below the working directory as well as a repository's, and the folder comes first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from bench.shapes.tokenizer import word_tokenizer
from support import models, transformers

TEXT_TOKENS = 16


def _tokenizer() -> CLIPTokenizer:
    tokenizer = word_tokenizer(["a", "red", "blue", "circle", "square"])
    tokenizer.model_max_length = TEXT_TOKENS
    return tokenizer


def _clip(width: int, kind: Any = CLIPTextModel, projection: int = 16) -> Any:
    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def _vae(**config: Any) -> AutoencoderKL:
    """Of eight pixels a side for one latent."""
    return AutoencoderKL(
        block_out_channels=4 * (8,),
        down_block_types=4 * ("DownEncoderBlock2D",),
        up_block_types=4 * ("UpDecoderBlock2D",),
        norm_num_groups=4,
        **config,
    ).eval()


SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 1,
    "cross_attention_dim": 768,  # as Stable Diffusion 1's, for pages that make a prompt by hand
}


def _unet() -> UNet2DConditionModel:
    """Of one transformer block, as compiling takes longer than anything else."""
    return UNet2DConditionModel(**SMALL, sample_size=16, up_block_types=("UpBlock2D",), mid_block_type=None).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1 in small."""
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(768),
        tokenizer=_tokenizer(),
        unet=_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL in small."""
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=False),
        text_encoder=_clip(8),
        text_encoder_2=_clip(8, CLIPTextModelWithProjection),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=models.sdxl(),
        scheduler=EulerDiscreteScheduler(),
    )


def flux() -> FluxPipeline:
    """Flux in small."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    t5 = T5Config(vocab_size=len(pieces), d_model=12, d_kv=6, d_ff=12, num_layers=1, num_heads=2)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(latent_channels=2, shift_factor=0.0),
        text_encoder=_clip(10),
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0),
        transformer=transformers.flux(),
    )


def _write_lora(folder: Path) -> None:
    """A LoRA of self-attention's queries, with an effect."""
    unet = _unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def write(folder: Path) -> None:
    """Write all of them, each below the folder by the name that pages load it by."""
    pipelines: dict[str, Callable[[], Any]] = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
        "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
        "black-forest-labs/FLUX.1-dev": flux,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, build in pipelines.items():
            build().save_pretrained(folder / name)
        controlnet = ControlNetModel(**SMALL, conditioning_embedding_out_channels=4 * (8,))
        controlnet.save_pretrained(folder / "lllyasviel/control_v11p_sd15_canny")
        _write_lora(folder / "LORA")
