"""What a transform saves: tokens and FLOPs for each site, and the bound on the speed-up of the whole model."""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tome_fx.api import transformed
from tome_fx.families.levels import Level
from tome_fx.families.registry import family_of
from tome_fx.families.sites import Site
from tome_fx.families.skeleton import skeleton
from tome_fx.graph.specialize import original
from tome_fx.plan import Grid, Plan, TransformError, downsampled, integer


@dataclass(frozen=True)
class SiteReport:
    """One site. Tokens and FLOPs are per image, or per frame of a clip; a multiply-add is two FLOPs.

    `flops_before` is the block's own cost, `flops_after` its cost with merged tokens, matching included. `unweighed`
    says why merged tokens are not weighed in self-attention, where they are not, and `note` why nothing is merged,
    where nothing is.
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
    unweighed: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What `explain` found; `print` shows it as a table, `rows` and `levels` are its data. FLOPs are per image.

    `levels` are all of the model's, with what merging at each saves and costs at the size that the model is made for:
    by that those to merge at are chosen where `max_downsample` is None.
    """

    title: str
    rows: tuple[SiteReport, ...]
    levels: tuple[Level, ...]
    flops_before: int
    flops_after: int

    @property
    def bound(self) -> float:
        """FLOPs of the whole model before over after: the speed-up if time went with FLOPs.

        Attention may take longer for its FLOPs than what else there is, and merging it then gains more.
        """
        return self.flops_before / self.flops_after

    def __str__(self) -> str:
        """The table, in which blocks in a row that are alike are one line, with a total and the bound."""
        from tabulate import tabulate  # only tables need it

        giga = 1e9
        lines: list[tuple[object, ...]] = []
        for _, (row, *alike) in groupby(self.rows, lambda row: (row.path.rpartition(".")[0], replace(row, path=""))):
            where = f"{row.path} - {alike[-1].path.rpartition('.')[2]}" if alike else row.path
            grid, merged = f"{row.height} x {row.width}", row.merged or f"0: {row.note}"
            flops = row.flops_before / giga, row.flops_after / giga
            lines.append((where, grid, row.tokens, merged, row.kept, ", ".join(row.scopes), *flops))
        lines.append(("whole model", *[""] * 5, self.flops_before / giga, self.flops_after / giga))
        heads = ("site", "grid", "tokens", "merged", "kept", "scopes", "GFLOPs before", "after")
        table = tabulate(lines, heads, floatfmt=".3f", disable_numparse=[1, 3])
        some_alike = len(lines) <= len(self.rows)  # besides the whole model's
        notes = ["A line of several blocks has the numbers of each."] if some_alike else []
        reasons = Counter(row.unweighed for row in self.rows if row.unweighed)
        notes += [f"Not weighed at {count} of {len(self.rows)} sites: {reason}." for reason, count in reasons.items()]
        notes += [
            f"Level of {level.height} x {level.width} tokens, at the size that the model is made for: "
            f"{'' if level.merged else 'not '}merged. In each transformer merging half of them would save "
            f"{level.saved / giga:.1f} GFLOPs, and what it adds take as long as {level.cost / giga:.1f}."
            for level in self.levels
        ]
        notes += ["The finest level is always merged."] if self.levels else []
        bound = f"If time went with FLOPs, the whole model would be {self.bound:.3f}x as fast."
        return "\n".join([self.title, "", table, "", *notes, bound])


def explain(model: nn.Module, height: int, width: int) -> Report:
    """Count what merging saves at a latent size, without running anything: shapes alone go through a copy of the model.

    Counted are the layers, a LoRA's among them, and attention. What surrounds the layers changes no count and is not
    called: hooks, attention processors, offloading, sharding, casting, quantization, checkpointing, compiled code.
    Not counted is what a processor does besides attention: the image prompt of an IP-Adapter, the perturbed images of
    PAG. Of a UNet's clip one frame is counted, of a transformer's video as many as pipelines make (21 latent frames for
    Wan), with a time step, a prompt as long as pipelines make it (77 tokens for UNets, 512 for Flux) and what else the
    config asks for.

    Args:
        model: What `tome_fx.transform` returned, compiled or not. It is left as it is.
        height: Latent rows, an eighth of the image's for Stable Diffusion.
        width: Latent columns.

    Returns:
        A `Report`. A site whose grid holds no whole cell merges nothing and says so.

    Raises:
        TypeError: `model`, `height` or `width` is of the wrong type.
        ValueError: `height` or `width` is below 1.
        TransformError: The model is not transformed, asks for inputs that are not known here, or has a module that
            shapes alone cannot go through.
    """
    model, merging = transformed(model)
    for name, size in (("height", height), ("width", width)):
        if integer(name, size) < 1:
            raise ValueError(f"{name} must be at least 1 latent, got {size}")
    plan, family = merging.plan, family_of(model)
    shapes = skeleton(model)
    after = _flops(shapes, height, width)
    sites = family.merged_sites(shapes, plan)
    for module in shapes.modules():
        module.__class__ = original(type(module))
    before = _flops(shapes, height, width)

    matching = {site.transformer: site for site in reversed(sites)}.values() if plan.share_match else sites
    rows = []
    for site in sites:
        side = downsampled(height, site.downsample), downsampled(width, site.downsample)
        matches = plan.matches and site in matching
        grid = Grid(*side, plan.sx, plan.sy, plan.ratio, plan.dynamic_ratio, plan.tile)
        rows.append(
            SiteReport(
                path=site.path,
                height=grid.height,
                width=grid.width,
                tokens=site.frames * grid.tokens,
                merged=site.frames * grid.merged,
                kept=site.frames * grid.kept,
                scopes=family.merged_around(plan),
                flops_before=before.get(site.path, 0),  # a block may be there and not be run
                flops_after=after.get(site.path, 0) + matches * site.frames * grid.match_flops(site.channels),
                unweighed=_unweighed(model, site, plan),
                note=grid.note,
            )
        )
    title = f"{type(shapes).__name__} at {height} x {width} latents: ratio {plan.ratio}, cells of {plan.sx} x {plan.sy}"
    return Report(title, tuple(rows), tuple(family.levels(shapes, plan)), before[""], after[""])


def _unweighed(model: nn.Module, site: Site, plan: Plan) -> str:
    """Why merged tokens are not weighed in a block; empty where they are."""
    if not (plan.merge_attn or plan.merge_block):
        return "self-attention is not merged"
    if plan.prop_attn is not None:
        return "" if plan.prop_attn else "prop_attn=False"
    return family_of(model).why_unweighed(model, site)


def _flops(model: nn.Module, height: int, width: int) -> dict[str, int]:
    """FLOPs of every module by its path, for one image; the model is a skeleton.

    Raises:
        TransformError: Its inputs are not known, or a module cannot be run for its shapes.
    """
    inputs = family_of(model).example_inputs(model, height, width, batch=1, device="meta")
    root = type(model).__name__
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    except TransformError:
        raise
    except Exception as error:
        raise TransformError(
            f"the FLOPs of {root} at {height} x {width} latents cannot be counted: its structure does not run on "
            f"tensors without values: {type(error).__name__}: {error}"
        ) from error
    counts = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {path.removeprefix(root).removeprefix("."): count for path, count in counts.items() if path != "Global"}
