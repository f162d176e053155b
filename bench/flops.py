"""FLOPs of a UNet call, counted for every variant alike: shapes alone go through it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from bench import models
from bench.cases import Case
from bench.variants import apply, predict
from tome_fx.families.inputs import example_inputs
from tome_fx.families.skeleton import skeleton

LATENTS = 128  # along a side, of an image of 1024 px for Stable Diffusion: what savings are told for
BESIDE = ("sd15", "sdxl")  # whose savings are told beside those of the model that makes the images


def saving(name: str, unet: UNet2DConditionModel, steps: int) -> Callable[[Case], dict[str, float]]:
    """What says of a case which share of the FLOPs of a UNet call it saves, by model: `unet` by this name, and others.

    Of a schedule it is the mean over its steps.
    """
    stock = {name: (shapes := skeleton(unet), counted(Case(), shapes)), **{other: _beside(other) for other in BESIDE}}

    def saved(case: Case) -> dict[str, float]:
        return {key: 1 - counted(case, shapes, steps) / all_of_it for key, (shapes, all_of_it) in stock.items()}

    return saved


@cache
def _beside(name: str) -> tuple[UNet2DConditionModel, float]:
    """A model's shapes, and the FLOPs of stock's call."""
    shapes = models.build(name, "meta")
    return shapes, counted(Case(), shapes)


def counted(case: Case, shapes: UNet2DConditionModel, steps: int = 1, *, side: int = LATENTS) -> float:
    """FLOPs of a call for one image, the mean over so many steps; a multiply-add is two.

    Args:
        case: What is merged.
        shapes: A UNet on the meta device.
        steps: Denoising steps of an image, where the case has a schedule.
        side: Latents along a side.
    """
    inputs = example_inputs(shapes, side, side, batch=1, device="meta")
    ratios = case.ratios(steps)
    counts = {}
    for ratio in set(ratios):
        call = apply(replace(case, ratio=ratio, schedule=()), shapes)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predict(call, inputs)
        counts[ratio] = counter.get_total_flops()
    return fmean(counts[ratio] for ratio in ratios)
