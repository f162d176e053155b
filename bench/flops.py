"""FLOPs of a call, counted for every variant alike: shapes alone go through it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import models
from bench.cases import Case
from bench.variants import apply, predict
from tome_fx.families.skeleton import skeleton

LATENTS = 128  # along a side, of an image of 1024 px for Stable Diffusion: what savings are told for
BESIDE = {"unet": ("sd15", "sdxl"), "transformer": ("sd35-medium", "flux")}  # those whose savings are told as well


def saving(name: str, model: nn.Module, steps: int) -> Callable[[Case], dict[str, float]]:
    """What says of a case which share of the FLOPs of a call it saves, by model: `model` by this name, and others.

    Of a schedule it is the mean over its steps.
    """
    others = BESIDE["unet" if isinstance(model, UNet2DConditionModel) else "transformer"]
    stock = {name: _stock(skeleton(model)), **{other: _beside(other) for other in others}}

    def saved(case: Case) -> dict[str, float]:
        return {
            key: 1 - counted(case, shapes, steps, side=side) / whole for key, (shapes, side, whole) in stock.items()
        }

    return saved


@cache
def _beside(name: str) -> tuple[nn.Module, int, float]:
    return _stock(models.build(name, "meta"))


def _stock(shapes: Any) -> tuple[nn.Module, int, float]:
    """A model's shapes, the latents along a side that it is counted at, and the FLOPs of stock's call."""
    side = min(LATENTS, shapes.config.get("pos_embed_max_size") or LATENTS)  # of a transformer with a table of places
    return shapes, side, counted(Case(), shapes, side=side)


def counted(case: Case, shapes: nn.Module, steps: int = 1, *, side: int = LATENTS) -> float:
    """FLOPs of a call for one image, the mean over so many steps; a multiply-add is two.

    Args:
        case: What is merged.
        shapes: A model on the meta device.
        steps: Denoising steps of an image, where the case has a schedule.
        side: Latents along a side.
    """
    inputs = models.example(shapes, side, side, 1)
    ratios = case.ratios(steps)
    counts = {}
    for ratio in set(ratios):
        call = apply(replace(case, ratio=ratio, schedule=()), shapes)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict(call, inputs)
        counts[ratio] = counter.get_total_flops()
    return fmean(counts[ratio] for ratio in ratios)
