"""The parts of a site of merging, each alone: where its time goes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import models
from bench.cases import DEFAULTS, Case
from bench.cells import Cell
from bench.models import Build
from bench.peers import finest_sites
from bench.tables import MERGING, SEARCHES
from bench.variants import merged
from bench.warm import Call
from tome_fx import ops, plan
from tome_fx.families.weights import weights

PARTS = (
    *(f"{part}, {search}" for search in SEARCHES for part in MERGING),
    *(f"attention, {tokens}" for tokens in ("all tokens", "merged", "merged and weighed")),
)


def of_a_site(cell: Cell, build: Build) -> dict[str, Callable[[], Call]]:
    """What prepares each part of a site, by its name; nothing for a transformer."""
    if cell.model in models.TRANSFORMERS:  # whose blocks are of many kinds
        return {}
    return {name: partial(_part, name, build, cell) for name in PARTS}


def _part(name: str, build: Build, cell: Cell) -> Call:
    """A part of a site of the finest level, compiled alone, to time."""
    unet = build(cell.model, cell.device, models.DTYPES[cell.dtype])
    site = finest_sites(unet)[0]
    side = cell.resolution // models.LATENT // site.downsample
    attention: Any = merged(unet, Case("tome_fx", cell.ratio)).get_submodule(f"{site.path}.attn1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same tokens for all parts
        tokens = torch.randn(cell.unet_batch, side * side, site.channels).to(unet.device, unet.dtype)
    part, of = name.split(", ")
    match = partial(
        ops.match,
        height=side,
        width=side,
        tile=None if of == SEARCHES[0] else DEFAULTS["tile"],
        kept=plan.kept(side, side, cell.ratio),
        sx=2,
        sy=2,
        seed=1,
    )

    def small() -> tuple[Any, ...]:
        slots = match(tokens)
        return ops.merge(tokens, slots), slots

    # What a part is given is computed for it alone, so that a failure is its own.
    parts: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
        "match": (match, lambda: (tokens,)),
        "merge": (ops.merge, lambda: (tokens, match(tokens))),
        "unmerge": (ops.unmerge, small),
        "attention, all tokens": (lambda x: attention(x), lambda: (tokens,)),
        "attention, merged": (lambda x: attention(x), lambda: small()[:1]),
        "attention, merged and weighed": (
            lambda x, slots: attention(x, attention_mask=weights(attention, x, slots)),
            small,
        ),
    }
    run, inputs = parts[name if name in parts else part]
    compiled, given = torch.compile(run, fullgraph=True), inputs()
    return lambda: compiled(*given)
