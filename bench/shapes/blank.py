"""The shapes pipelines before they are trained: their sizes and their schedules."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bench.models import assemble
from bench.shapes import TEXT_TOKENS, with_transformer
from bench.shapes.scenes import SIDE, numbered
from bench.shapes.tokenizer import word_tokenizer

WIDTH = 96  # of the text's tokens


def vae() -> AutoencoderKL:
    """Four latents for 4 x 4 pixels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline around a trained VAE, with its denoiser and text encoder untrained."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(sorted({word for one in numbered(0, 1000) for word in one.caption.split()}))
    tokenizer.model_max_length = TEXT_TOKENS
    text_encoder = _text_encoder(tokenizer)
    return assemble(_unet(), vae, _scheduler(), text_encoder, tokenizer)


def transformer_pipeline(trained: StableDiffusionPipeline) -> StableDiffusion3Pipeline:
    """A pipeline of a transformer that is untrained, and of a trained one, as whose text encoder its own begins."""
    torch.manual_seed(0)
    config = CLIPTextConfig(**trained.text_encoder.config.to_dict() | {"projection_dim": WIDTH})
    text_encoder = CLIPTextModelWithProjection(config)
    text_encoder.text_model.load_state_dict(trained.text_encoder.state_dict())
    return with_transformer(trained, _transformer(), text_encoder)


def _transformer() -> SD3Transformer2DModel:
    """One that trains faster than by the class's own random numbers.

    Each block begins as the identity, which "Scalable Diffusion Models with Transformers" (2022), arXiv 2212.09748,
    found best. Queries begin as the keys, so that a token first attends to those like it and near it, as in "Mimetic
    Initialization of Self-Attention Layers" (2023), arXiv 2305.09828.
    """
    model = SD3Transformer2DModel(
        sample_size=SIDE // 4,
        patch_size=1,  # 32 x 32 tokens, as the UNet has at its finest level
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE // 4,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith((".linear", "proj_out")):  # what modulates, and the last of all
                nn.init.zeros_(module.weight)
    for block in model.transformer_blocks:
        block.attn.to_k.load_state_dict(block.attn.to_q.state_dict())
    return model


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(32, 64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 1),  # one stacked, as in SDXL
        attention_head_dim=(1, 2, 4),  # heads, whatever the name says
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
