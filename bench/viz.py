"""Pictures in files: images side by side, and which tokens of an image were merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.images import generate
from tome_fx import viz

DPI = 110


def grid(path: Path, columns: Mapping[str, Sequence[Tensor]], rows: Sequence[str] = ()) -> None:
    """Write a PNG of `tome_fx.viz.side_by_side`, which has the arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    viz.side_by_side(columns, rows).savefig(path, dpi=DPI)


def merge_maps(path: Path, pipe: Any, prompt: str, title: str, *, steps: int, guidance: float) -> None:
    """Make an image as `bench.images` does and write a PNG of what was merged in it.

    Args:
        path: Where to.
        pipe: A pipeline whose UNet is transformed and not compiled.
        prompt: What to make.
        title: Of the image's own column.
        steps: Denoising steps of the image; shown are the first, the middle and the last.
        guidance: Scale of the classifier-free guidance. The half of the batch that has the prompt is shown.

    Raises:
        TransformError: No block is handed a slot map.
    """
    with viz.recorded_slots(pipe.unet) as recorded:
        images = generate(pipe, pipe.unet, [prompt], steps=steps, guidance=guidance)
    figure = viz.drawn(images.pixels[0], recorded, images.latents.shape[-2:], title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
