"""A tiny Stable Diffusion pipeline of the project's own: its data set, its training and its judge."""

from pathlib import Path

from diffusers import StableDiffusionPipeline

PIPELINE = Path(__file__).parent / "pipeline"
TEXT_TOKENS = 16  # the longest caption has 13
GUIDANCE = 3.0  # scale of the classifier-free guidance that it is judged with


def pipeline() -> StableDiffusionPipeline:
    """The trained pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
