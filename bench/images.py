"""Images of a pipeline whose UNet is another: latents from seeds, and the pixels that they decode to."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Images:
    """Latents `[B, C, h, w]` and pixels `[B, 3, H, W]` from 0 to 1."""

    latents: Tensor
    pixels: Tensor


class AsUNet(nn.Module):
    """Lets a pipeline call a variant, whatever it is, where it expects a UNet; what else it reads is the UNet's own."""

    def __init__(self, call: Callable[..., Any], unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.call = call
        self.unet = unet

    def __getattr__(self, name: str) -> Any:
        """What is not found here is looked for in the UNet: SDXL's pipeline reads its `add_embedding`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unet":  # not there yet, or there is no end to it
                raise
            return getattr(self.unet, name)

    def forward(self, sample: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        """The sample is given by position, as `bench.variants` asks for, all else by name."""
        return self.call(sample, timestep=timestep, **kwargs)


def denoise(
    pipe: Any, call: Callable[..., Any], *, seeds: Sequence[int], steps: int, guidance: float, **inputs: Any
) -> Tensor:
    """Latents of an image for each seed; the pipeline itself is left as it is.

    Args:
        pipe: A pipeline with a UNet.
        call: What is called in its place.
        seeds: Of the noise that each image begins as.
        steps: Denoising steps.
        guidance: Scale of the classifier-free guidance; 1 for none.
        **inputs: What else the pipeline is given: prompts, or their embeddings, and the size.
    """
    unet = pipe.unet
    pipe.unet = AsUNet(call, unet)
    try:
        latents: Tensor = pipe(
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **inputs,
        ).images
    finally:
        pipe.unet = unet
    return latents


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """The pixels of latents, from 0 to 1."""
    pixels: Tensor = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return (pixels / 2 + 0.5).clamp(0, 1)


def generate(
    pipe: Any,
    call: Callable[..., Any],
    prompts: Sequence[str],
    *,
    batch: int = 16,
    title: str | None = None,
    **how: Any,
) -> Images:
    """An image for each prompt, the i-th from seed i, so many at once; `how` as `denoise` has it.

    Raises:
        ValueError: An image is not finite.
    """
    parts = []
    for first in tqdm(range(0, len(prompts), batch), title, file=sys.stderr, leave=False, disable=title is None):
        some = list(prompts[first : first + batch])
        latents = denoise(pipe, call, seeds=range(first, first + len(some)), prompt=some, **how)
        pixels = decode(pipe, latents)
        if not pixels.isfinite().all():
            raise ValueError(f"an image is not finite: try another dtype than {pipe.unet.dtype}")
        parts.append((latents.float().cpu(), pixels.float().cpu()))
    return Images(*map(torch.cat, zip(*parts, strict=True)))
