"""The public verb: check the arguments, copy the structure, swap the classes."""

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from tome_fx.capture import MODELS, rewritten_classes
from tome_fx.plan import Plan, TransformError

Model = TypeVar("Model", bound=nn.Module)


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
) -> Model:
    """Give a UNet token merging: similar image tokens are averaged before attention and copied back after it.

    Returns a new model of the same type which shares every parameter and buffer with the one given. The model
    given is left as it is. The result runs eagerly, and `torch.compile(..., fullgraph=True)` takes it whole.

    Args:
        model: A `UNet2DConditionModel` or `ControlNetModel`, not compiled and not transformed yet.
        ratio: Share of the tokens to remove, from 0 (the original, bit for bit) to `1 - 1 / (sx * sy)`. Half is
            where images still look the same, says the paper.
        max_downsample: Merge at the levels whose tokens are at most this many latents wide: 1, 2, 4 or 8. None
            is the finest level that has attention, which saves most and costs least: 1 for Stable Diffusion 1
            and 2, 2 for SDXL.
        sx: Width of the cells that give one destination each, in tokens.
        sy: Height of the cells, in tokens. 2 x 2 lets up to three quarters of the tokens merge.
        use_rand: Choose the destination in each cell pseudo-randomly, which avoids the pattern of a regular grid.
            False takes the top left token of every cell.
        seed: For `use_rand`, from 0 to 2**32 - 1. The choice is a pure function of seed, block and cell: the same
            in every step, batch and run, compiled or not. No random number generator is read or advanced.
        merge_attn: Merge around self-attention, where the cost is quadratic.
        merge_crossattn: Merge around cross-attention as well. Costs quality for little speed.
        merge_mlp: Merge around the feed-forward as well. Costs quality.

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
    )
    _check_model(model)
    classes = rewritten_classes(model, plan)
    result = share(model)
    for path, cls in classes.items():
        result.get_submodule(path).__class__ = cls
    return result


def share(model: Model) -> Model:
    """A copy of the model with a structure and a state of its own and the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _check_model(model: object) -> None:
    expected = " or ".join(cls.__name__ for cls in MODELS)
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TransformError(f"model is compiled already ({name}): transform it first, then compile the result")
    if not isinstance(model, MODELS):
        hint = "; pass pipe.unet, not the pipeline" if hasattr(model, "unet") else ""
        raise TypeError(f"model must be a {expected}, got {name}{hint}")
    for path, module in model.named_modules():
        where = f"{path} ({type(module).__name__})"
        if hasattr(type(module), "rewrite"):
            raise TransformError(f"model is transformed already, at {where}: transform the original instead")
        if module._compiled_call_impl is not None:
            raise TransformError(f"model is compiled already, at {where}: transform it first, then compile the result")
        if "forward" in vars(module):
            raise TransformError(
                f"forward of {where} is replaced on the instance, as offloading hooks do: transform the model first, "
                "then enable them on the result"
            )
