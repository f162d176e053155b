"""Pictures of what is merged; they need matplotlib, which the extra `viz` brings."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tome_fx.api import compiled_parts, transformed
from tome_fx.families.registry import family_of
from tome_fx.families.sites import Site
from tome_fx.ops import SlotMap
from tome_fx.plan import MERGING, TransformError, downsampled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 768  # pixels that small images are enlarged to, so that outlines are thin beside tokens


def merge_map(pipe: Any, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> "Figure":
    """Make an image with a pipeline and draw what is merged meanwhile:

        tome_fx.viz.merge_map(pipe, "a red circle").savefig("map.png")

    There is a row for each slot map and a column for the first, the middle and the last call of the model. Tokens that
    are merged into one have their mean colour and an outline. Of a batch the last image is drawn, under classifier-free
    guidance the half that has the prompt. The pipeline is left as it is.

    Args:
        pipe: A pipeline of diffusers that makes images, with a transformed model that is not compiled.
        *args: Of the pipeline's call: prompts.
        **kwargs: Of the pipeline's call: steps, size, generator.
        model: Which of its models; None for the one that is transformed.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: There is no matplotlib.
        TypeError: `pipe` is no pipeline, or `output_type` is given.
        TransformError: No model is transformed or several are, the model is compiled, its blocks are handed no slot
            map (with `merge_block=True`, or at a ratio of 0), its tokens are not those of one image (with a second
            picture to edit), or the pipeline makes no images.

    Source: the figures of Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023).
    """
    _figure_class()  # an image takes long
    if not callable(pipe) or isinstance(pipe, nn.Module):
        raise TypeError(f"pipe must be a pipeline of diffusers, got a {type(pipe).__name__}")
    if "output_type" in kwargs:
        raise TypeError(f"output_type must be left out, for images are drawn; got {kwargs['output_type']!r}")
    with recorded_slots(_transformed_part(pipe) if model is None else model) as recorded:
        images = getattr(pipe(*args, output_type="pt", **kwargs), "images", None)
    if images is None:
        raise TransformError(f"{type(pipe).__name__} has made no images, on which merged tokens would be drawn")
    latents = [side // getattr(pipe, "vae_scale_factor", 1) for side in images.shape[-2:]]
    return drawn(images[-1].float().cpu(), recorded, latents)


@dataclass
class Recorded:
    """What a model has merged, call by call.

    Args:
        sites: The blocks that merge.
        slots: Of each block, by its path, the slots int32 `[N]` of the last image of the batch, by the number of the
            model's call; none where nothing was merged.
        calls: Of the model.
    """

    sites: list[Site]
    slots: dict[str, dict[int, Tensor]] = field(init=False)
    calls: int = 0

    def __post_init__(self) -> None:
        self.slots = {site.path: {} for site in self.sites}


@contextmanager
def recorded_slots(model: nn.Module) -> Iterator[Recorded]:
    """While within, what the model merges in each call.

    Args:
        model: What `tome_fx.transform` returned, not compiled.

    Raises:
        TypeError: The model is of a kind that cannot be transformed.
        TransformError: The model is not transformed, or compiled.
    """
    inner, merging = transformed(model)
    if compiled_parts(model):
        raise TransformError(
            f"{type(inner).__name__} is compiled, and compiled code calls no hooks: draw what it merges before that"
        )
    recorded = Recorded(family_of(inner).merged_sites(inner, merging.plan))
    first = {site.transformer: site.path for site in reversed(recorded.sites)}

    def count(*_: Any) -> None:
        recorded.calls += 1

    def note(site: Site) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else kwargs["hidden_states"]
            for value in (*args, *kwargs.values()):
                if isinstance(value, SlotMap):
                    # Text comes first in some slot maps, and in some tokens as well, but not in those of first blocks.
                    of_first = recorded.slots[first[site.transformer]].get(recorded.calls - 1, tokens[0])
                    text = value.slot.shape[1] - len(of_first)
                    recorded.slots[site.path][recorded.calls - 1] = value.slot[-1, text:].cpu() - text

        return hook

    handles = [inner.register_forward_pre_hook(count)]
    for site in recorded.sites:
        handles.append(inner.get_submodule(site.path).register_forward_pre_hook(note(site), with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def drawn(image: Tensor, recorded: Recorded, latents: Sequence[int], title: str = "image") -> "Figure":
    """A row for each slot map, a column for the first, the middle and the last call; blocks that merge alike share one.

    Args:
        image: `[3, H, W]` from 0 to 1, what came of the calls.
        recorded: What was merged in them.
        latents: Height and width of the image in latents.
        title: Of the image's own column.

    Raises:
        ImportError: There is no matplotlib.
        TransformError: No block was handed a slot map, or tokens are not those of one image.
    """
    shown = sorted({0, recorded.calls // 2, max(0, recorded.calls - 1)})
    rows: list[tuple[list[Site], list[Tensor | None]]] = []
    for site in recorded.sites:
        slots = [recorded.slots[site.path].get(call) for call in shown]
        alike = next((sites for sites, others in rows if all(map(_equal, slots, others))), None)
        if alike is not None:
            alike.append(site)
        elif any(slot is not None for slot in slots):
            rows.append(([site], slots))
    if not rows:
        raise TransformError("no block has a slot map to draw: none has at a ratio of 0 or with merge_block=True")
    image = F.interpolate(image[None], scale_factor=max(1, SIDE // max(image.shape[-2:])))[0]
    columns: dict[str, list[Tensor]] = {title: [image] * len(rows)}
    for place, call in enumerate(shown):
        columns[f"call {call + 1} of {recorded.calls}"] = [
            image if (slot := slots[place]) is None else painted(image, slot, *_grid(site, slot, latents))
            for (site, *_), slots in rows
        ]
    return side_by_side(columns, [_name(sites) for sites, _ in rows], inches=1.9)  # names are long


def painted(image: Tensor, slot: Tensor, height: int, width: int) -> Tensor:
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
    colours = F.interpolate(means[:, slot].view(1, 3, height, width), side)[0]
    result = torch.where(merged, colours, image)
    label = F.interpolate(slot.double().view(1, 1, height, width), side)[0, 0]
    edge = torch.zeros(side, dtype=torch.bool)
    across, down = label[:, 1:] != label[:, :-1], label[1:] != label[:-1]
    for side_of in (edge[:, 1:], edge[:, :-1]):  # both sides, for a token that was merged with none has no line
        side_of |= across
    for side_of in (edge[1:], edge[:-1]):
        side_of |= down
    return torch.where(edge & merged, 0.25 * result, result)


def side_by_side(columns: Mapping[str, Sequence[Tensor]], rows: Sequence[str] = (), inches: float = 1.4) -> "Figure":
    """A figure of images `[3, H, W]` from 0 to 1.

    Args:
        columns: The images of each column, under its title.
        rows: What to write at the left of each row.
        inches: The side of an image.

    Raises:
        ImportError: There is no matplotlib.
    """
    height = len(next(iter(columns.values())))
    figure = _figure_class()(figsize=(inches * len(columns), (inches + 0.05) * height), layout="compressed")
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
    return figure


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure  # only pictures need it
    except ImportError as error:
        raise ImportError("tome_fx.viz draws with matplotlib, which is not there: pip install matplotlib") from error
    return Figure


def _transformed_part(pipe: Any) -> nn.Module:
    """The one model of a pipeline that is transformed."""
    found = {name: part for name, part in vars(pipe).items() if hasattr(part, MERGING)}
    if len(found) != 1:
        there = ", ".join(found) or "none"
        raise TransformError(
            f"expected one transformed model in {type(pipe).__name__}, found {there}: pass model= for one of several, "
            "or what tome_fx.transform returned to the pipeline"
        )
    return next(iter(found.values()))  # type: ignore[no-any-return]


def _grid(site: Site, slot: Tensor, latents: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a block's tokens."""
    rows, columns = (downsampled(side, site.downsample) for side in latents)
    if rows * columns != len(slot):
        raise TransformError(
            f"expected the {rows} x {columns} tokens of one image in {site.path}, found {len(slot)}: what is merged "
            "in several pictures at once, or in a part of one, is not drawn"
        )
    return rows, columns


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _name(sites: list[Site]) -> str:
    """The path of the first block, with a space where it may be broken, and how many more merge alike."""
    first, more = sites[0], len(sites) - 1
    path = " .".join(filter(None, (first.transformer, first.block)))
    return f"{path} and {more} more" if more else path
