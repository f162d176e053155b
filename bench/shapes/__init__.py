"""Tiny pipelines of the project's own: their data set, their training and their judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPTextModelWithProjection

PIPELINE = Path(__file__).parent / "pipeline"
TRANSFORMER = Path(__file__).parent / "transformer"
TEXT_TOKENS = 16  # the longest caption has 13
GUIDANCE = 3.0  # scale of the classifier-free guidance that they are judged with


def pipeline() -> StableDiffusionPipeline:
    """The trained pipeline with a UNet."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer_pipeline(folder: Path = TRANSFORMER) -> StableDiffusion3Pipeline:
    """The trained pipeline with a diffusion transformer, which is kept without what it has of the other."""
    text_encoder, transformer = (
        cls.from_pretrained(folder, subfolder=part, local_files_only=True)
        for part, cls in (("text_encoder", CLIPTextModelWithProjection), ("transformer", SD3Transformer2DModel))
    )
    return with_transformer(pipeline(), transformer.eval(), text_encoder)


def with_transformer(
    pipe: StableDiffusionPipeline, transformer: SD3Transformer2DModel, text_encoder: CLIPTextModelWithProjection
) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's pipeline with the VAE and the tokenizer of another, and one text encoder for both of its."""
    pipe.vae.register_to_config(shift_factor=0.0)
    result = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=pipe.vae,
        text_encoder=text_encoder,
        tokenizer=pipe.tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=pipe.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    result.set_progress_bar_config(disable=True)
    return result


PIPELINES: dict[str, Callable[[], Any]] = {"shapes": pipeline, "shapes-transformer": transformer_pipeline}


def inputs(pipe: Any) -> dict[str, Any]:
    """What a shapes pipeline is called with besides prompts: Stable Diffusion 3's puts in zeros for a T5's tokens."""
    return {"max_sequence_length": 1} if hasattr(pipe, "transformer") else {}
