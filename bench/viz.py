"""Pictures: images side by side, and which tokens of an image were merged."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.images import generate
from tome_fx.families.unet import find_sites
from tome_fx.plan import downsampled


def grid(path: Path, columns: Mapping[str, Sequence[Tensor]], rows: Sequence[str] = (), inches: float = 1.4) -> None:
    """Write a PNG of images `[3, H, W]` from 0 to 1.

    Args:
        path: Where to.
        columns: The images of each column, under its title.
        rows: What to write at the left of each row.
        inches: The side of an image.
    """
    from matplotlib.figure import Figure  # only pictures need it

    height = len(next(iter(columns.values())))
    figure = Figure(figsize=(inches * len(columns), (inches + 0.05) * height))
    axes = figure.subplots(height, len(columns), squeeze=False)
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


def merge_maps(path: Path, pipe: Any, prompt: str, title: str, *, steps: int, guidance: float) -> None:
    """Make an image and write a PNG of what was merged in it: a row for each site, a column for each of three steps.

    Args:
        path: Where to.
        pipe: A pipeline whose UNet is transformed and not compiled.
        prompt: What to make.
        title: Of the image's own column.
        steps: Denoising steps of the image; shown are the first, the middle and the last.
        guidance: Scale of the classifier-free guidance. The half of the batch that has the prompt is shown.

    Raises:
        ValueError: No block is handed a slot map.
    """
    with recorded_slots(pipe.unet) as slots:
        images = generate(pipe, pipe.unet, [prompt], steps=steps, guidance=guidance)
    image = F.interpolate(images.pixels, scale_factor=3)[0]  # so that outlines are thin beside tokens
    sites = [site for site in find_sites(pipe.unet) if slots[site.path]]
    if not sites:
        raise ValueError("no block has a slot map to draw: none has at a ratio of 0 or with merge_block=True")
    grids = [[downsampled(side, site.downsample) for side in images.latents.shape[-2:]] for site in sites]
    columns: dict[str, list[Tensor]] = {title: [image] * len(sites)}
    for step in sorted({0, steps // 2, steps - 1}):
        columns[f"step {step + 1} of {steps}"] = [
            merge_map(image, slots[site.path][step][-1], *sides) for site, sides in zip(sites, grids, strict=True)
        ]
    # a row's name is longer than a prompt's lines
    grid(path, columns, [f"{site.transformer} .{site.block}" for site in sites], inches=1.9)


@contextmanager
def recorded_slots(unet: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """While within, the slots `[B, N]` of each call of each block, by its path, where it merges; eager models only."""
    found: dict[str, list[Tensor]] = {site.path: [] for site in find_sites(unet)}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("slots") is not None:
                found[path].append(kwargs["slots"].slot.cpu())

        return hook

    handles = [unet.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
