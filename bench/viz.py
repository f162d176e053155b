"""Pictures: images side by side, and which tokens of an image were merged."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome_fx.api import transformed
from tome_fx.families.unet import merged_sites
from tome_fx.plan import downsampled


def grid(path: Path, columns: Mapping[str, Sequence[Tensor]], rows: Sequence[str] = (), inches: float = 1.4) -> None:
    """Write a PNG of images `[3, H, W]` from 0 to 1.

    Args:
        path: Where to.
        columns: The images of each column, under its title.
        rows: What to write at the left of each row.
        inches: The side of an image.
    """
    import matplotlib as mpl  # only pictures need it

    mpl.use("agg")
    from matplotlib import pyplot as plt

    height = len(next(iter(columns.values())))
    figure, axes = plt.subplots(
        height, len(columns), figsize=(inches * len(columns), (inches + 0.05) * height), squeeze=False
    )
    for x, (title, images) in enumerate(columns.items()):
        for y, image in enumerate(images):
            axis = axes[y][x]
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if y == 0:
                axis.set_title(textwrap.fill(title, 20, break_long_words=False), fontsize=8)
            if x == 0 and rows:
                axis.set_ylabel(textwrap.fill(rows[y], 22, break_long_words=False), fontsize=7)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def merge_map(image: Tensor, slot: Tensor, height: int, width: int) -> Tensor:
    """The image with each group of merged tokens painted in its mean colour and outlined.

    Args:
        image: `[3, H, W]` from 0 to 1.
        slot: The place of every token in the merged sequence, `[N]`, of a grid of `height x width`.
        height: Rows of the grid.
        width: Columns of the grid.

    Returns:
        `[3, H, W]`. Tokens that were merged with none are left as they are.
    """
    side = image.shape[-2:]
    tokens = F.adaptive_avg_pool2d(image, (height, width)).flatten(1)
    groups = int(slot.max()) + 1
    sizes = torch.bincount(slot, minlength=groups)
    means = torch.zeros(3, groups).index_add(1, slot, tokens) / sizes
    merged = F.interpolate((sizes[slot] > 1).float().view(1, 1, height, width), side)[0, 0] > 0
    painted = F.interpolate(means[:, slot].view(1, 3, height, width), side)[0]
    result = torch.where(merged, painted, image)
    label = F.interpolate(slot.double().view(1, 1, height, width), side)[0, 0]
    edge = torch.zeros(side, dtype=torch.bool)
    across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
    for side_of in (edge[:, 1:], edge[:, :-1]):  # both sides, for a token that was merged with none has no line
        side_of |= across
    for side_of in (edge[1:], edge[:-1]):
        side_of |= down
    return torch.where(edge & merged, 0.25 * result, result)


def merge_maps(path: Path, pipe: Any, prompt: str, *, steps: int, guidance: float, seed: int = 0) -> None:
    """Make an image and write a PNG of what was merged in it: a row for each site, a column for each of three steps.

    Args:
        path: Where to.
        pipe: A pipeline whose UNet is transformed and not compiled.
        prompt: What to make.
        steps: Denoising steps of the image; shown are the first, the middle and the last.
        guidance: Scale of the classifier-free guidance. The half of the batch that has the prompt is shown.
        seed: Of the image.
    """
    with torch.no_grad(), recorded_slots(pipe.unet) as slots:
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
        latents = pipe(prompt, generator=generator, **options).images
        image = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample[0]
        image = F.interpolate(image[None].float().cpu(), scale_factor=3)[0]  # so that outlines are thin beside tokens
        image = image.clamp(-1, 1) / 2 + 0.5
    plan = transformed(pipe.unet)[1].plan
    sites = {site.path: site for site in merged_sites(pipe.unet, plan)}
    columns: dict[str, list[Tensor]] = {f"ratio {plan.ratio:g}": [image] * len(sites)}
    for step in sorted({0, steps // 2, steps - 1}):
        columns[f"step {step + 1} of {steps}"] = [
            merge_map(
                image, calls[step][-1], *(downsampled(side, sites[where].downsample) for side in latents.shape[-2:])
            )
            for where, calls in slots.items()
        ]
    # a row's name is longer than a prompt's lines
    grid(path, columns, [where.replace(".transformer_blocks", " .transformer_blocks") for where in slots], inches=1.9)


@contextmanager
def recorded_slots(unet: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """While within, the slots `[B, N]` of each call of each merged block, by the block's path; eager models only."""
    model, merging = transformed(unet)
    found: dict[str, list[Tensor]] = {site.path: [] for site in merged_sites(model, merging.plan)}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[path].append(kwargs["slots"].slot.cpu())

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
