"""Images of a pipeline whose denoiser is another: latents from seeds, and the pixels that they decode to."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Images:
    """Latents `[B, C, h, w]` and pixels `[B, 3, H, W]` from 0 to 1."""

    latents: Tensor
    pixels: Tensor


class AsDenoiser(nn.Module):
    """Lets a pipeline call a variant in the place of its denoiser, whose own is whatever else it reads."""

    def __init__(self, call: Callable[..., Any], denoiser: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        """What is not found here is looked for in the denoiser: SDXL's pipeline reads its `add_embedding`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoiser":  # not there yet, or there is no end to it
                raise
            return getattr(self.denoiser, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The sample or the tokens are given by position, as `bench.variants` asks for, all else by name."""
        first, *time = args or (kwargs.pop("hidden_states"),)
        return self.call(first, **dict(zip(("timestep",), time, strict=False)), **kwargs)


def denoiser_name(pipe: Any) -> str:
    """What a pipeline calls the part that removes noise."""
    return next(name for name in ("unet", "transformer") if hasattr(pipe, name))


def denoiser_of(pipe: Any) -> Any:
    """That part."""
    return getattr(pipe, denoiser_name(pipe))


def denoise(
    pipe: Any, call: Callable[..., Any], *, seeds: Sequence[int], steps: int, guidance: float, **inputs: Any
) -> Tensor:
    """Latents of an image for each seed; the pipeline itself is left as it is.

    Args:
        pipe: A pipeline with a UNet or a transformer.
        call: What is called in its place.
        seeds: Of the noise that each image begins as.
        steps: Denoising steps.
        guidance: Scale of the classifier-free guidance; 1 for none.
        **inputs: What else the pipeline is given: prompts, or their embeddings, and the size.
    """
    name, denoiser = denoiser_name(pipe), denoiser_of(pipe)
    setattr(pipe, name, AsDenoiser(call, denoiser))
    try:
        latents: Tensor = pipe(
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **inputs,
        ).images
    finally:
        setattr(pipe, name, denoiser)
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
            raise ValueError(f"an image is not finite: try another dtype than {denoiser_of(pipe).dtype}")
        parts.append((latents.float().cpu(), pixels.float().cpu()))
    return Images(*map(torch.cat, zip(*parts, strict=True)))
