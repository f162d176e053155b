"""What a transform saves: tokens and FLOPs for each site, and the bound on the speed-up of the whole model."""

from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tome_fx.api import transformed
from tome_fx.families.inputs import example_inputs
from tome_fx.families.unet import VIDEO, Model, merged_sites, share
from tome_fx.graph.specialize import original
from tome_fx.plan import Grid, downsampled, integer


@dataclass(frozen=True)
class Row:
    """One site. Tokens and FLOPs are per image, or per frame of a clip; a multiply-add is two FLOPs.

    `flops_before` is the block's own cost, `flops_after` its cost with merged tokens, matching included. `note`
    says why nothing is merged, where nothing is.
    """

    path: str
    height: int
    width: int
    tokens: int
    merged: int
    kept: int
    scopes: tuple[str, ...]
    flops_before: int
    flops_after: int
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `explain` found; `print` shows it as a table, `rows` are its data. FLOPs are per image."""

    title: str
    rows: tuple[Row, ...]
    flops_before: int
    flops_after: int

    @property
    def bound(self) -> float:
        """FLOPs of the whole model before over after: no merging of these tokens can be faster than that."""
        return self.flops_before / self.flops_after

    def __str__(self) -> str:
        """The table, with a total and the bound."""
        giga = 1e9
        lines: list[tuple[object, ...]] = [
            (
                row.path,
                f"{row.height} x {row.width}",
                row.tokens,
                row.merged or f"0: {row.note}",
                row.kept,
                ", ".join(row.scopes),
                row.flops_before / giga,
                row.flops_after / giga,
            )
            for row in self.rows
        ]
        lines.append(("whole model", *[""] * 5, self.flops_before / giga, self.flops_after / giga))
        heads = ("site", "grid", "tokens", "merged", "kept", "scopes", "GFLOPs before", "after")
        table = tabulate(lines, heads, floatfmt=".3f", disable_numparse=[1, 3])
        return f"{self.title}\n\n{table}\n\nThe FLOPs bound the speed-up of the whole model at {self.bound:.3f}x."


def explain(model: nn.Module, height: int, width: int) -> Report:
    """Count what merging saves at a latent size, without running anything: the model is evaluated on meta tensors.

    Args:
        model: What `tome_fx.transform` returned, compiled or not. It is left as it is.
        height: Latent rows, an eighth of the image's for Stable Diffusion.
        width: Latent columns.

    Returns:
        A `Report`. A site whose grid holds no whole cell merges nothing and says so.

    Raises:
        TypeError: `model`, `height` or `width` is of the wrong type.
        ValueError: `height` or `width` is below 1.
        TransformError: The model is not transformed, or asks for inputs that are not known here.
    """
    model, merging = transformed(model)
    for name, size in (("height", height), ("width", width)):
        if integer(name, size) < 1:
            raise ValueError(f"{name} must be at least 1 latent, got {size}")
    plan = merging.plan
    before, after = _flops(_plain(model), height, width), _flops(share(model), height, width)  # a copy is not compiled

    rows = []
    for site in merged_sites(model, plan):
        side = downsampled(height, site.downsample), downsampled(width, site.downsample)
        grid = Grid(*side, plan.sx, plan.sy, plan.ratio, plan.dynamic_ratio)
        rows.append(
            Row(
                path=site.path,
                height=grid.height,
                width=grid.width,
                tokens=grid.tokens,
                merged=grid.merged,
                kept=grid.kept,
                scopes=plan.scopes,
                flops_before=before[site.path],
                flops_after=after[site.path] + plan.matches * grid.match_flops(site.channels),
                note=grid.note,
            )
        )
    title = f"{type(model).__name__} at {height} x {width} latents: ratio {plan.ratio}, cells of {plan.sx} x {plan.sy}"
    return Report(title, tuple(rows), before[""], after[""])


def _plain(model: Model) -> Model:
    """A copy without its merging, sharing parameters and buffers."""
    result = share(model)
    for module in result.modules():
        module.__class__ = original(type(module))
    return result


def _flops(model: nn.Module, height: int, width: int) -> dict[str, int]:
    """FLOPs of every module by its path, for one image; the model is a copy, whose hooks are taken off."""
    for module in model.modules():  # what users hang on to a call is not for this one
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }
    some = next(model.parameters())
    frames = 1 if isinstance(model, VIDEO) else None
    inputs = example_inputs(model, height, width, batch=1, frames=frames, device="meta", dtype=some.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, weights, kwargs=inputs)
    root = type(model).__name__
    counts = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {path.removeprefix(root).removeprefix("."): count for path, count in counts.items() if path != "Global"}
