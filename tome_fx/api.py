"""The public verbs: check the arguments, copy the structure, swap the classes.

NOTE [A forward of the model's own]
dynamo compiles one code object at most 8 times, and every UNet of a process has the same forward. So a transformed
model has a copy of that function on the instance, whose code object belongs to the plan: each ratio has the limit
to itself, and models of the same plan share what is compiled. The code does nothing that the original's does not.
A new ratio makes a new function. Where offloading hooks have been wrapped around the old one, which then cannot be
replaced, it is given the new code instead.
"""

import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tome_fx.families.unet import MODELS, Model, given, merged_sites, rewritten_classes, share
from tome_fx.graph.rewrite import RATIO_SIZE
from tome_fx.graph.specialize import with_own_code
from tome_fx.plan import Plan, TransformError

MERGING = "tome_fx"  # the attribute of a transformed model that holds its Merging


def transform(
    model: Model,
    ratio: float = 0.5,
    *,
    max_downsample: int | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    seed: int = 0,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    prop_attn: bool = False,
    dynamic_ratio: bool = False,
) -> Model:
    """Give a UNet token merging: similar image tokens are averaged before attention and copied back after it.

    Returns a new model of the same type which shares every parameter and buffer with the one given. The model
    given is left as it is. The result runs eagerly, and `torch.compile(..., fullgraph=True)` takes it whole.

    Args:
        model: A `UNet2DConditionModel`, `ControlNetModel`, `UNetMotionModel` or `UNet3DConditionModel`, not compiled
            and not transformed yet. Of the last two the blocks over single frames are merged in, those over time never.
        ratio: Share of the tokens to remove, from 0 (the original, bit for bit) to `1 - 1 / (sx * sy)`. Half is
            where images still look the same, says the paper.
        max_downsample: Merge at the levels whose tokens are at most this many latents wide: 1, 2, 4 or 8. None
            is the finest level that has attention, which saves most and costs least: 1 for Stable Diffusion 1
            and 2, 2 for SDXL.
        sx: Width of the cells that give one destination each, in tokens.
        sy: Height of the cells, in tokens. 2 x 2 lets up to three quarters of the tokens merge.
        use_rand: Choose the destination in each cell pseudo-randomly, which avoids the pattern of a regular grid.
            False takes the top left token of every cell.
        seed: For `use_rand`, from 0 to 2**32 - 1. The choice is a pure function of seed and cell: the same in every
            block, step, batch and run, compiled or not. No random number generator is read or advanced.
        merge_attn: Merge around self-attention, where the cost is quadratic.
        merge_crossattn: Merge around cross-attention as well. Costs quality for little speed.
        merge_mlp: Merge around the feed-forward as well. Costs quality.
        prop_attn: Weigh each merged token in self-attention by how many tokens it stands for, which is meant to keep
            the image closer to the original. False is what tomesd does, and leaves attention without a mask, which
            some of a GPU's kernels cannot take.
        dynamic_ratio: Make the number of kept tokens a dynamic size, so that one compiled graph serves every ratio
            that `set_ratio` gives it. The ratio is then a whole number of thousandths, and at 0 tokens are still
            matched. False compiles once for each ratio, and 0 is free.

    Raises:
        TypeError: An argument is of the wrong type; `model` is a pipeline, say.
        ValueError: An option is out of range, or would do nothing.
        TransformError: The model cannot be transformed: it has no block that the options reach, is transformed
            already, is compiled already, or has offloading hooks in place.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), https://arxiv.org/abs/2303.17604.
    """
    plan = Plan(
        ratio=ratio,
        max_downsample=max_downsample,
        sx=sx,
        sy=sy,
        use_rand=use_rand,
        seed=seed,
        merge_attn=merge_attn,
        merge_crossattn=merge_crossattn,
        merge_mlp=merge_mlp,
        prop_attn=prop_attn,
        dynamic_ratio=dynamic_ratio,
    )
    _check_model(model)
    result = share(model, given(model))
    for module in result.modules():
        vars(module).pop("forward", None)  # the class's own, which hooks leave there: it would hide the rewritten one
    _install(result, plan)
    return result


def set_ratio(model: nn.Module, ratio: float) -> None:
    """Change the ratio of a transformed model in place, compiled or not; its weights and all else stay.

    A model compiled whole compiles once more on its first call at a new ratio and not at all at a ratio it has had
    before; with `dynamic_ratio=True` it never compiles again. Block by block, blocks compile once more for the second
    number of kept tokens that they see, and then serve any.

    Args:
        model: What `transform` returned, or what `torch.compile` made of it. A copy of it keeps its own ratio.
        ratio: Share of the tokens to remove, as for `transform`.

    Raises:
        TypeError: `ratio` is not a number, or `model` of a kind that cannot be transformed.
        ValueError: `ratio` is out of range. The model is left as it was.
        TransformError: The model is not transformed.
    """
    model, merging = transformed(model)
    plan = replace(merging.plan, ratio=ratio)
    if plan != merging.plan:
        _install(model, plan)


@dataclass(frozen=True)
class Merging:
    """What a transformed model knows of itself.

    Args:
        plan: What is merged.
        forward: The model's own function; see NOTE [A forward of the model's own].
    """

    plan: Plan
    forward: types.FunctionType


def transformed(model: nn.Module) -> tuple[nn.Module, Merging]:
    """The model itself, out of what `torch.compile` wraps around it, and its merging.

    Raises:
        TypeError: `model` is of a kind that cannot be transformed at all.
        TransformError: The model is not transformed.
    """
    model = getattr(model, "_orig_mod", model)
    _check_type(model)
    merging = getattr(model, MERGING, None)
    if merging is None:
        raise TransformError(f"{type(model).__name__} is not transformed: pass what tome_fx.transform returned")
    return model, merging


def _install(model: nn.Module, plan: Plan) -> None:
    """Make the model one of this plan, in place: its classes, the tensor that says a dynamic ratio, its forward."""
    for path, cls in rewritten_classes(model, plan).items():
        model.get_submodule(path).__class__ = cls
    if plan.dynamic_ratio:
        with torch.inference_mode(False):  # an inference tensor fails the guard of a graph compiled outside of it
            size = torch.empty(plan.ratio_size, 0, dtype=torch.float32, device="cpu")
        torch._dynamo.mark_dynamic(size, 0)
        for path in {site.transformer for site in merged_sites(model, plan)}:
            setattr(model.get_submodule(path), RATIO_SIZE, size)
    forward: Any = type(model).forward
    forward = with_own_code(forward, replace(plan, ratio=plan.static_ratio or 0.0))
    merging, current = getattr(model, MERGING, None), vars(model).get("forward")
    if merging is None or getattr(current, "__func__", None) is merging.forward:
        model.forward = types.MethodType(forward, model)
    else:
        merging.forward.__code__ = forward.__code__
        forward = merging.forward
    setattr(model, MERGING, Merging(plan, forward))


def _check_type(model: object) -> None:
    if not isinstance(model, MODELS):
        *names, last = (cls.__name__ for cls in MODELS)
        hint = "; pass pipe.unet, not the pipeline" if hasattr(model, "unet") else ""
        raise TypeError(f"model must be a {', '.join(names)} or {last}, got {type(model).__name__}{hint}")


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TransformError(f"model is compiled already ({name}): transform it first, then compile the result")
    _check_type(model)
    if hasattr(model, MERGING):
        raise TransformError(
            "model is transformed already: change its ratio with tome_fx.set_ratio, or transform the original instead"
        )
    for path, module in model.named_modules():
        where = f"{path or 'model'} ({type(module).__name__})"
        if module._compiled_call_impl is not None:
            raise TransformError(f"model is compiled already, at {where}: transform it first, then compile the result")
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            raise TransformError(
                f"forward of {where} is replaced on the instance, as offloading hooks do: transform the model first, "
                "then enable them on the result"
            )
