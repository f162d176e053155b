"""Transformers to compile alone: those of a UNet, one of each grid, and the forms of merging in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

import tome_fx
from bench import models
from bench.cuda_code import MODULE

# Of `transform`, beside the ratio
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "unweighted": {"prop_attn": False},
    "tiles of 16": {"tile": 16},
    "whole grid": {"tile": None},
    "tomesd's": dict(tome_fx.TOMESD),
    "dynamic ratio": {"dynamic_ratio": True},
    "keys and values": {"merge_queries": False},
    "whole block": {"merge_block": True},
}


@dataclass(frozen=True)
class Level:
    """The first transformer of a UNet at a grid.

    Args:
        path: Its path in the UNet.
        image: `[B, C, H, W]`, what it is given.
        prompt: `[B, S, D]`, likewise, or None.
        blocks: How many it has.
    """

    path: str
    image: tuple[int, ...]
    prompt: tuple[int, ...] | None
    blocks: int


def levels(name: str, resolution: int, batch: int) -> list[Level]:
    """The levels of a UNet, from fine to coarse.

    Args:
        name: Of `bench.models.build`.
        resolution: Pixels along a side.
        batch: What the UNet sees at once.
    """
    found: dict[torch.Size, Level] = {}

    def note(path: str, module: Any, args: Any, given: Any) -> None:
        image = args[0] if args else given["hidden_states"]
        prompt = given.get("encoder_hidden_states")
        shapes = tuple(image.shape), None if prompt is None else tuple(prompt.shape)
        found.setdefault(image.shape, Level(path, *shapes, len(module.transformer_blocks)))

    with torch.device("meta"), torch.no_grad():
        unet = models.build(name, "meta")
        for path, module in unet.named_modules():
            if isinstance(module, Transformer2DModel):
                module.register_forward_pre_hook(
                    lambda module, args, given, path=path: note(path, module, args, given), with_kwargs=True
                )
        unet(**models.inputs(unet, resolution, batch))
    return sorted(found.values(), key=lambda level: -level.image[-1])


def transformer(name: str, level: Level, options: Mapping[str, Any] | None) -> MODULE:
    """The transformer of a level, for `write`.

    Args:
        name: Of `bench.models.build`.
        level: From `levels` of the same UNet.
        options: Of `transform`, or None for the stock UNet.
    """
    unet = models.build(name, "cuda")
    if options is not None:
        unet = tome_fx.transform(unet, **options)
    prompt = None if level.prompt is None else torch.empty(level.prompt)
    arguments = {"hidden_states": torch.empty(level.image), "encoder_hidden_states": prompt, "return_dict": False}
    return unet.get_submodule(level.path), arguments
